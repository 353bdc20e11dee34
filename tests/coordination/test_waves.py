"""Waves: which placements lie on the way where the union does not fit at once."""

import itertools

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from pipelive_kv import waves as module
from pipelive_kv.placement import Placement
from pipelive_kv.plan import StageBudget, plan
from pipelive_kv.waves import waves, would_fit

PAGE = 4096


def all_placements(layers, stages, stack):
    for bounds in itertools.combinations_with_replacement(range(layers + 1), stages - 1):
        ends = (0, *bounds, layers)
        if all(end % stack == 0 or end == layers for end in ends):
            yield Placement.from_counts([b - a for a, b in itertools.pairwise(ends)])


def fits(old, new, budgets, live):
    return plan(old, new, budgets, live_blocks=live).fits


def fewest(current, target, budgets, live, candidates):
    """Breadth first over all placements that there are; None where the target is not reached."""
    depth, reached, frontier = 0, {current}, {current}
    while frontier:
        if target in frontier:
            return depth
        frontier = {
            new
            for new in candidates
            if new not in reached and any(fits(old, new, budgets, live) for old in frontier)
        }
        reached |= frontier
        depth += 1
    return None


@st.composite
def cases(draw):
    stack = draw(st.sampled_from([1, 1, 2]))
    stages = draw(st.integers(2, 4))
    layers = draw(st.integers(2, 7 if stages < 4 else 5))
    live = draw(st.integers(1, 8))
    uneven = draw(st.booleans())
    weights = tuple(
        PAGE * w
        for w in draw(
            st.lists(st.integers(0, 3 if uneven else 0), min_size=layers, max_size=layers)
        )
    )
    budgets = [
        StageBudget(PAGE * draw(st.integers(2, 20)), weights, 1024, page_bytes=PAGE, stack=stack)
        for _ in range(stages)
    ]
    choices = list(all_placements(layers, stages, stack))
    return draw(st.sampled_from(choices)), draw(st.sampled_from(choices)), budgets, live, choices


@settings(max_examples=120, deadline=None)
@given(cases(), st.booleans())
def test_every_wave_fits_and_they_are_the_fewest(case, exact):
    current, target, budgets, live, choices = case
    assume(fits(current, current, budgets, live) and current != target)
    found = _found(current, target, budgets, live, exact)
    least = fewest(current, target, budgets, live, choices)
    if least is None:
        assert found == ()
        return
    if not found:  # layers of unlike sizes can be in each other's way when not all ways are tried
        assert not exact
        assert max(budgets[0].layer_bytes) > 0
        return
    assert found[-1] == target
    for old, new in itertools.pairwise((current, *found)):
        assert fits(old, new, budgets, live)
        assert old.num_layers == new.num_layers
    assert len(set(found)) == len(found)
    if exact:
        assert len(found) == least


def _found(current, target, budgets, live, exact):
    with pytest.MonkeyPatch.context() as patch:
        if not exact:
            patch.setattr(module, "_EXACT", 0)
        return waves(current, target, budgets, live_blocks=live)


@settings(max_examples=60, deadline=None)
@given(cases())
def test_layers_of_one_size_always_find_their_way(case):
    """Where both placements fit by themselves, one layer at a time there is a way."""
    current, target, budgets, live, _ = case
    even = [
        StageBudget(b.budget_bytes, PAGE, 1024, page_bytes=PAGE, stack=b.stack) for b in budgets
    ]
    spare = [
        StageBudget(
            b.budget_bytes + b.stack * PAGE + b.bytes_needed(b.stack, live),
            PAGE,
            1024,
            page_bytes=PAGE,
            stack=b.stack,
        )
        for b in even
    ]
    if fits(current, current, even, live) and fits(target, target, even, live):
        for exact in (True, False):
            assert _found(current, target, spare, live, exact)


def test_a_large_move_in_two():
    # Nine pages hold nine layers of one page: eight of the new and the old layers, not twelve.
    budgets = [StageBudget(9 * PAGE, 0, 1024, page_bytes=PAGE)] * 3
    current, target = Placement.from_counts([0, 6, 6]), Placement.from_counts([6, 6, 0])
    assert not fits(current, target, budgets, 4)
    found = waves(current, target, budgets, live_blocks=4)
    assert len(found) == 2
    assert waves(current, target, budgets, live_blocks=5) == ()


def test_forty_layers_on_eight_stages():
    budgets = [StageBudget(9 * PAGE, 0, 1024, page_bytes=PAGE)] * 8
    current = Placement.from_counts([8, 8, 8, 8, 8, 0, 0, 0])
    target = Placement.from_counts([0, 0, 0, 8, 8, 8, 8, 8])
    found = waves(current, target, budgets, live_blocks=4)
    assert found[-1] == target
    for old, new in itertools.pairwise((current, *found)):
        assert fits(old, new, budgets, 4)


def test_the_nearest_that_would_fit():
    budgets = [StageBudget(20 * PAGE, 0, 512, page_bytes=PAGE)] * 2
    current, target = Placement.from_counts([4, 2]), Placement.from_counts([0, 6])
    # 38 blocks take five pages of a layer, so four layers fit.
    assert would_fit(current, target, budgets, live_blocks=38) == (
        Placement.from_counts([2, 4]),
        Placement.from_counts([3, 3]),
    )
    assert would_fit(current, target, budgets, live_blocks=38, most=1) == (
        Placement.from_counts([2, 4]),
    )


@settings(max_examples=50, deadline=None)
@given(cases())
def test_what_would_fit_is_reached(case):
    current, target, budgets, live, choices = case
    found = would_fit(current, target, budgets, live_blocks=live)
    assert current not in found
    distances = [_distance(placement, target, budgets[0].stack) for placement in found]
    assert distances == sorted(distances)
    for placement in found:
        assert placement in choices
        assert fewest(current, placement, budgets, live, choices) is not None


def _distance(a, b, stack):
    """In whole stacks; the last one may be smaller."""
    ends = zip(itertools.accumulate(a.counts), itertools.accumulate(b.counts), strict=True)
    return sum(abs(-(-x // stack) - -(-y // stack)) for x, y in ends)

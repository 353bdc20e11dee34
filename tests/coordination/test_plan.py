import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelive_kv.errors import InvalidArgumentError
from pipelive_kv.placement import Placement
from pipelive_kv.plan import StageBudget, plan

budgets = st.builds(
    StageBudget,
    budget_bytes=st.integers(0, 1 << 26),
    layer_bytes=st.integers(0, 1 << 20),
    block_bytes=st.integers(1, 1 << 16),
    page_bytes=st.sampled_from([4096, 1 << 16, 2 << 20]),
    stack=st.sampled_from([1, 2, 4]),
    other_bytes=st.integers(0, 1 << 20),
)


@given(budgets, st.integers(1, 12))
def test_what_fits_is_the_most_that_fits(budget, stacks):
    layers = stacks * budget.stack
    fits = budget.blocks_that_fit(layers)
    room = budget.budget_bytes - budget.other_bytes - layers * budget.layer_bytes
    if fits >= 0:
        assert budget.bytes_needed(layers, fits) <= room
        assert budget.bytes_needed(layers, fits + 1) > room
    else:
        assert room < 0


def test_plan_takes_the_tightest_stage():
    big = StageBudget(100 * 4096, 0, 1024, page_bytes=4096)
    small = StageBudget(40 * 4096, 4096, 1024, page_bytes=4096)
    found = plan(
        Placement.from_counts([6, 4]), Placement.from_counts([4, 6]), [big, small], live_blocks=5
    )
    assert found.fits
    assert found.tightest_stage == 1
    assert found.blocks_during == (40 - 6) // 6 * 4
    assert [move.layers for move in found.moves] == [(4, 5)]
    refused = plan(
        Placement.from_counts([6, 4]), Placement.from_counts([0, 10]), [big, small], live_blocks=40
    )
    assert not refused.fits
    assert "stage 1 lacks" in refused.reason


def test_a_stage_without_layers_does_not_limit():
    budget = StageBudget(10 * 4096, 0, 4096, page_bytes=4096)
    found = plan(
        Placement.from_counts([0, 5]),
        Placement.from_counts([0, 5]),
        [StageBudget(0, 0, 4096), budget],
        max_blocks=100,
    )
    assert (found.blocks_during, found.fits) == (2, True)


def test_refuses_bad_arguments():
    placement = Placement.from_counts([1, 1])
    with pytest.raises(InvalidArgumentError, match="1 budgets, expected 2"):
        plan(placement, placement, [StageBudget(1, 1, 1)])
    with pytest.raises(InvalidArgumentError, match="block_bytes is 0"):
        StageBudget(1, 1, 0)
    with pytest.raises(InvalidArgumentError, match="budget_bytes is -1"):
        StageBudget(-1, 1, 1)
    with pytest.raises(InvalidArgumentError, match="stack"):
        plan(placement, placement, [StageBudget(1, 1, 1, stack=2)] * 2)

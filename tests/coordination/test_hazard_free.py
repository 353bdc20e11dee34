"""The switchover without a drain: a gained layer never runs on KV that has not come yet."""

import itertools

import pytest
from hazard_world import World
from hypothesis import given, settings
from hypothesis import strategies as st

import pipelive_kv as pk

LAYERS = 4


@st.composite
def worlds(draw):
    stages = draw(st.integers(2, 3))
    cut = st.lists(st.integers(0, LAYERS), min_size=stages - 1, max_size=stages - 1)
    placements = []
    for _ in range(2):
        edges = [0, *sorted(draw(cut)), LAYERS]
        placements.append([high - low for low, high in itertools.pairwise(edges)])
    return {
        "seed": draw(st.integers(0, 2**32)),
        "old": placements[0],
        "new": placements[1],
        "in_flight": draw(st.integers(1, 5)),
        "switch_at": draw(st.integers(0, 12)),
        "requests": draw(st.integers(1, 8)),
        "narrows": draw(st.booleans()),
    }


def play(given, mutation=""):
    world = World(**given, mutation=mutation)
    try:
        world.play()
        return world
    finally:
        world.close()


@settings(max_examples=300, deadline=None)
@given(given=worlds())
def test_every_read_finds_the_last_write_whatever_the_order(given):
    play(given)


def cases(count, **more):
    """Down, up, both at once, and a swap over three stages; chosen for many steps in flight."""
    moves = [([3, 1], [1, 3]), ([1, 3], [3, 1]), ([2, 0, 2], [0, 4, 0]), ([0, 4, 0], [2, 0, 2])]
    for seed in range(count):
        old, new = moves[seed % len(moves)]
        yield {
            "seed": seed,
            "old": old,
            "new": new,
            "in_flight": 2 + seed % 4,
            "switch_at": 4 + seed % 7,
            "requests": 6,
            **more,
        }


def test_the_cases_hold_hazards_and_closed_gates():
    """Without them the property above would show nothing."""
    played = [play(case) for case in cases(60)]
    assert sum(world.blocked_gates > 0 for world in played) > 10
    assert sum(bool(world.deferred) for world in played) > 10
    assert sum(world.shared > 0 for world in played) > 10


def test_the_cases_hold_steps_that_follow_on_and_steps_that_do_not():
    """The same for an engine that tells what its steps touch."""
    played = [play(case) for case in cases(60, narrows=True)]
    assert sum(world.blocked_gates > 0 for world in played) > 10
    assert sum(world.followed > 0 for world in played) > 10
    assert sum(world.narrowed > 0 for world in played) > 10


@pytest.mark.parametrize("mutation", ["gate", "hazards", "unsealed", "narrow"])
def test_a_rule_that_is_left_out_is_found_out(mutation):
    def fails(case):
        try:
            play(case, mutation)
        except AssertionError as error:
            return "found token" in str(error)
        return False

    assert any(fails(case) for case in cases(200, narrows=mutation == "narrow"))


def test_only_the_last_stamp_can_be_narrowed():
    with_one = pk.Scheduler(pk.Placement.from_counts([2]), allocator=pk.BlockAllocator(4, 4))
    first = with_one.stamp()
    assert first.needs is None
    assert with_one.narrow(first, touches=[1], writes=[1]).needs == -1
    second = with_one.stamp()
    with pytest.raises(pk.InvalidArgumentError, match=r"stamp is of step 0, expected .* 1"):
        with_one.narrow(first, touches=[], writes=[])
    assert with_one.narrow(second, touches=[1, 2], writes=[2]).needs == 0
    with_one.stamp()  # of which nothing is told
    assert with_one.narrow(with_one.stamp(), touches=[3], writes=[3]).needs == 2
    with_one.retired(2)
    assert with_one.narrow(with_one.stamp(), touches=[1], writes=[1]).needs == 2
    assert with_one.narrow(with_one.stamp(), touches=[3], writes=[]).needs == 3
    with_one.close()

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelive_kv.errors import InvalidArgumentError
from pipelive_kv.placement import Move, Placement, whole_stacks

counts = st.lists(st.integers(0, 12), min_size=1, max_size=5).filter(lambda c: sum(c) > 0)


@st.composite
def placement_pairs(draw):
    first = draw(counts)
    total, stages = sum(first), len(first)
    cuts = sorted(draw(st.lists(st.integers(0, total), min_size=stages - 1, max_size=stages - 1)))
    edges = [0, *cuts, total]
    second = [b - a for a, b in itertools.pairwise(edges)]
    return Placement.from_counts(first), Placement.from_counts(second)


@given(counts)
def test_counts_round_trip(found):
    placement = Placement.from_counts(found)
    assert placement.counts == tuple(found)
    assert placement.num_layers == sum(found)
    for layer in range(placement.num_layers):
        assert layer in placement.layers_of(placement.stage_of(layer))


@given(placement_pairs())
def test_moves_turn_one_placement_into_the_other(pair):
    old, new = pair
    holder = {layer: old.stage_of(layer) for layer in range(old.num_layers)}
    for move in old.moves_to(new):
        assert move.layers == tuple(sorted(move.layers))
        for layer in move.layers:
            assert holder[layer] == move.source
            holder[layer] = move.target
    assert holder == {layer: new.stage_of(layer) for layer in range(new.num_layers)}
    for stage in range(old.num_stages):
        assert set(old.union_with(new, stage)) == {*old.layers_of(stage), *new.layers_of(stage)}


def test_moves_both_ways():
    old, new = Placement.from_counts([4, 4, 4]), Placement.from_counts([2, 8, 2])
    assert old.moves_to(new) == [Move((2, 3), 0, 1), Move((8, 9), 2, 1)]
    assert new.moves_to(old) == [Move((2, 3), 1, 0), Move((8, 9), 1, 2)]
    assert old.moves_to(old) == []


@pytest.mark.parametrize(
    ("stages", "says"),
    [
        ((), "empty"),
        (((),), "no layer"),
        (((1,),), r"stages\[0\] is \(1,\), expected layer 0"),
        (((0, 2),), "expected layer 1"),
        (((1,), (0,)), "expected layer 0"),
        (((0, 0),), "expected layer 1"),
    ],
)
def test_refuses_what_is_no_placement(stages, says):
    with pytest.raises(InvalidArgumentError, match=says):
        Placement(stages)


def test_refuses_bad_arguments():
    placement = Placement.from_counts([2, 2])
    with pytest.raises(InvalidArgumentError, match=r"counts\[1\] is -1"):
        Placement.from_counts([2, -1])
    with pytest.raises(InvalidArgumentError, match="stage is 2, expected 0 to 1"):
        placement.layers_of(2)
    with pytest.raises(InvalidArgumentError, match="layer is 4"):
        placement.stage_of(4)
    with pytest.raises(InvalidArgumentError, match="5 layers on 2 stages"):
        placement.moves_to(Placement.from_counts([3, 2]))


def test_stacks_move_whole():
    whole_stacks([Placement.from_counts([4, 3])], 2)
    with pytest.raises(InvalidArgumentError, match="stack of layers 2 to 3"):
        whole_stacks([Placement.from_counts([3, 4])], 2)

"""vLLM's block pool under our scheduler: what is live, and how it shrinks and grows."""

from __future__ import annotations

import random
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from pipelive_kv import OverBudgetError


@pytest.fixture
def make():
    from vllm.v1.core.block_pool import BlockPool

    from pipelive_kv.engines.vllm.blocks import VllmBlocks

    def made(count: int, least: int = 2):
        pool = BlockPool(num_gpu_blocks=count, enable_caching=True, hash_block_size=4)
        return pool, VllmBlocks(pool, least=least)

    return made


def cache(pool, blocks, tag: int) -> None:
    hashes = [f"{tag}-{index}".encode() for index in range(len(blocks))]
    request = SimpleNamespace(block_hashes=hashes)
    pool.cache_full_blocks(request, blocks, 0, len(blocks), 4, 0)


def lookup(pool, tag: int, index: int):
    return pool.get_cached_block(f"{tag}-{index}".encode(), [0])


def check(pool) -> None:
    """Ids are places in the list; every block is either referenced or free, once."""
    assert [block.block_id for block in pool.blocks] == list(range(pool.num_gpu_blocks))
    free = pool.free_block_queue.get_all_free_blocks()
    assert len(free) == pool.get_num_free_blocks() == len({id(block) for block in free})
    held = [b for b in pool.blocks if b.ref_cnt > 0]
    assert len(free) + len(held) + 1 == pool.num_gpu_blocks
    assert all(block.block_id < pool.num_gpu_blocks for block in free)


def test_live_are_referenced_and_cached_blocks(make):
    pool, owner = make(10)
    held, cached = pool.get_new_blocks(2), pool.get_new_blocks(2)
    cache(pool, cached, 1)
    pool.free_blocks(cached)
    plain = pool.get_new_blocks(1)
    pool.free_blocks(plain)
    assert owner.live() == sorted([0, *(b.block_id for b in held), *(b.block_id for b in cached)])
    assert owner.count_live() == len(owner.live())


def test_a_shrink_moves_blocks_in_use_and_keeps_cached_ones_while_there_is_room(make):
    pool, owner = make(10)
    low, high = pool.get_new_blocks(4), pool.get_new_blocks(4)
    cache(pool, high, 1)
    pool.free_blocks(low)
    pool.free_blocks(high[2:])
    owner_moves = owner.plan_shrink(6)
    owner.apply_shrink(6, owner_moves)
    check(pool)
    assert {high[0].block_id, high[1].block_id} <= set(range(6))
    for index in range(4):
        found = lookup(pool, 1, index)
        assert found is not None
        assert found[0] is high[index]
        assert found[0].block_id == owner_moves.get(5 + index, 5 + index)


def test_cached_blocks_give_way_to_those_in_use(make):
    pool, owner = make(8)
    low, high = pool.get_new_blocks(3), pool.get_new_blocks(4)
    cache(pool, low, 1)
    pool.free_blocks(reversed(low))
    moves = owner.plan_shrink(6)
    owner.apply_shrink(6, moves)
    check(pool)
    assert moves == {6: 3, 7: 2} or len(moves) == 2
    assert all(block.block_id < 6 for block in high)
    assert lookup(pool, 1, 0) is not None  # the start of a prefix is worth the most


def test_a_shrink_below_what_is_in_use_is_refused_and_names_the_busy_blocks(make):
    pool, owner = make(10)
    pool.get_new_blocks(8)
    with pytest.raises(OverBudgetError, match=r"9 blocks are in use .* \[5, 6, 7, 8\]"):
        owner.plan_shrink(5)
    check(pool)


def test_a_shrink_below_one_request_is_refused(make):
    _, owner = make(10, least=6)
    with pytest.raises(OverBudgetError, match="one request of max_model_len needs 6"):
        owner.plan_shrink(5)


def test_growth_adds_blocks_that_can_be_had(make):
    pool, owner = make(4)
    owner.raise_capacity(9)
    assert owner.capacity == pool.num_gpu_blocks == 9
    check(pool)
    assert len(pool.get_new_blocks(8)) == 8


@pytest.mark.parametrize("seed", range(20))
def test_any_order_of_calls_keeps_content_findable(make, seed):
    """The blocks of a request hold the same bytes before and after whatever happens."""
    dice = random.Random(seed)
    pool, owner = make(24)
    memory = dict.fromkeys(range(64))
    requests: dict[int, list] = {}
    content: dict[int, str] = {}
    for number in range(200):
        match dice.choice(["new", "new", "free", "shrink", "grow"]):
            case "new" if pool.get_num_free_blocks() > 4:
                blocks = pool.get_new_blocks(dice.randint(1, 4))
                requests[number] = blocks
                for index, block in enumerate(blocks):
                    memory[block.block_id] = content[id(block)] = f"{number}-{index}"
                if dice.random() < 0.7:
                    cache(pool, blocks, number)
            case "free" if requests:
                pool.free_blocks(reversed(requests.pop(dice.choice(list(requests)))))
            case "shrink":
                capacity = dice.randint(2, pool.num_gpu_blocks)
                try:
                    moves = owner.plan_shrink(capacity)
                except OverBudgetError:
                    continue
                if len(moves) > 1 and dice.random() < 0.5:  # its upper part alone
                    part = sorted(moves)[dice.randrange(1, len(moves)) :]
                    capacity, moves = part[0], {old: moves[old] for old in part}
                before = dict(memory)
                owner.apply_shrink(capacity, moves)
                assert pool.num_gpu_blocks == capacity
                for old, new in moves.items():
                    memory[new] = before[old]
            case "grow":
                owner.raise_capacity(min(64, pool.num_gpu_blocks + dice.randint(0, 8)))
        check(pool)
        for blocks in requests.values():
            for block in blocks:
                assert memory[block.block_id] == content[id(block)]
        for block in pool.blocks:
            if block.block_hash is not None:
                assert block.block_id in owner.live()
                assert memory[block.block_id] == content[id(block)]


@given(st.data())
def test_renamed_tables_are_as_from_a_loop(data):
    from pipelive_kv.engines.vllm.worker import remap

    ids = st.integers(0, 40)
    shape = data.draw(st.tuples(st.integers(1, 6), st.integers(1, 8)), label="shape")
    rows = data.draw(arrays(np.int32, shape, elements=ids), label="rows")
    counts = data.draw(
        arrays(np.int32, shape[0], elements=st.integers(0, shape[1])), label="counts"
    )
    moves = data.draw(st.dictionaries(ids, ids, min_size=1), label="moves")
    lists = data.draw(st.lists(st.lists(ids)), label="lists")

    expected = rows.copy()
    for row, count in enumerate(counts):
        for column in range(count):
            expected[row, column] = moves.get(int(rows[row, column]), rows[row, column])
    renamed = [[moves.get(block, block) for block in found] for found in lists]
    remap(moves, lists, rows, counts)
    assert (rows == expected).all()
    assert lists == renamed

"""What the allocator refuses, and that threads never share a block."""

import threading

import numpy as np
import pytest

from pipelive_kv.blocks import BlockAllocator
from pipelive_kv.errors import BusyError, InvalidArgumentError, OverBudgetError


@pytest.fixture
def blocks():
    return BlockAllocator(100, 10)


def test_numbers_out_of_range_are_refused(blocks):
    for call, message in (
        (lambda: BlockAllocator(0, 1), "max_blocks is 0"),
        (lambda: BlockAllocator(2**31, 1), "max_blocks is 2147483648"),
        (lambda: BlockAllocator(5, 0), "capacity is 0"),
        (lambda: BlockAllocator(5, 6), "capacity is 6, expected 1 to 5"),
        (lambda: blocks.allocate(-1), "count is -1"),
        (lambda: blocks.generation(100), "id is 100"),
        (lambda: blocks.refcount(-1), "id is -1"),
        (lambda: blocks.writable(-1), "id is -1"),
        (lambda: blocks.writable(0), "null block"),
        (lambda: blocks.release([], -1), "after_seq is -1"),
        (lambda: blocks.raise_capacity(101), "capacity is 101"),
        (lambda: blocks.plan_shrink(11), "capacity is 11"),
        (lambda: blocks.apply_shrink(9, {}), "none is"),
        (lambda: blocks.apply_shrink(9, {}, -1), "after_seq is -1"),
    ):
        with pytest.raises(InvalidArgumentError, match=message):
            call()


@pytest.mark.parametrize("ids", [[1.0], [[1]], 3, ["1"]])
def test_ids_must_be_integers(blocks, ids):
    blocks.allocate(3)
    with pytest.raises(InvalidArgumentError, match="ids has"):
        blocks.share(ids)
    with pytest.raises(InvalidArgumentError, match="ids has"):
        blocks.release(ids)
    assert blocks.live() == [0, 1, 2, 3]


def test_ids_come_in_many_kinds(blocks):
    blocks.allocate(6)
    blocks.release(np.array([1, 2], dtype=np.int32))
    blocks.release((3,))
    blocks.release([np.int64(4)])
    assert blocks.live() == [0, 5, 6]


def test_a_double_free_is_refused(blocks):
    first, second = blocks.allocate(2)
    blocks.release([first])
    with pytest.raises(InvalidArgumentError, match=r"ids\[1\] is 1, which is not allocated"):
        blocks.release([second, first])
    blocks.release([second], 3)
    with pytest.raises(InvalidArgumentError, match="released already and is in quarantine"):
        blocks.release([second], 4)
    assert blocks.quarantined() == [second]


def test_a_cache_keeps_a_block_by_holding_a_reference(blocks):
    (block,) = blocks.allocate(1)
    blocks.share([block])  # the cache's
    blocks.release([block], after_seq=3)  # the request ends
    assert blocks.live() == [0, block]
    assert blocks.quarantined() == []
    blocks.release([block], after_seq=5)  # evicted
    assert blocks.quarantined() == [block]


def test_a_shrink_that_must_wait_can_be_tried_again(blocks):
    ids = blocks.allocate(9)
    blocks.release(ids[:4])
    blocks.release([9], after_seq=7)
    moves = blocks.plan_shrink(6)
    with pytest.raises(BusyError, match="block 9, past the new capacity 6"):
        blocks.apply_shrink(6, moves)
    assert blocks.allocate(1) == [4]  # 1 to 3 are targets
    with pytest.raises(OverBudgetError, match="a shrink is planned"):
        blocks.allocate(1)
    assert blocks.plan_shrink(6) == moves == {6: 1, 7: 2, 8: 3}
    blocks.retire(7)
    blocks.apply_shrink(6, moves)
    assert blocks.live() == [0, 1, 2, 3, 4, 5]


def test_a_refused_shrink_names_the_counts(blocks):
    blocks.allocate(9)
    blocks.release([1], 0)
    with pytest.raises(
        OverBudgetError,
        match=r"9 live blocks .* and 1 in quarantine .* capacity of 9 blocks",
    ):
        blocks.plan_shrink(9)
    assert blocks.planned_capacity is None


def test_threads_never_hold_the_same_block():
    blocks = BlockAllocator(64, 64)
    holders = [0] * 64
    lock, clashes = threading.Lock(), []

    def work(seed):
        random = np.random.default_rng(seed)
        for step in range(200):
            try:
                ids = blocks.allocate(int(random.integers(0, 20)))
            except OverBudgetError:
                continue
            with lock:
                for i in ids:
                    holders[i] += 1
                    if holders[i] > 1:
                        clashes.append(i)
            with lock:
                for i in ids:
                    holders[i] -= 1
            blocks.release(ids, step if step % 2 else None)
            blocks.retire(step - 1)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    blocks.retire(200)
    assert not clashes
    assert blocks.num_free == 63

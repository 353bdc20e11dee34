"""Arguments of every kind, what is refused, and the arithmetic on ranges."""

import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelive_kv.errors import BusyError, InvalidArgumentError
from pipelive_kv.tracker import (
    DirtyTracker,
    blocks_touched,
    intersect_ranges,
    merge_ranges,
    ranges_of_blocks,
)


@pytest.fixture
def tracker():
    tracker = DirtyTracker(100)
    tracker.open(0)
    return tracker


def collect(tracker, seq=0):
    tracker.seal(seq)
    return tracker.collect().ranges.tolist()


def as_ranges(*pairs):
    return np.array(pairs, dtype=np.uint64).reshape(-1, 2)


class HostTensor:
    """Speaks DLPack and nothing else."""

    def __init__(self, array):
        self._array = array

    def __dlpack__(self, **options):
        return self._array.__dlpack__(**options)

    def __dlpack_device__(self):
        return self._array.__dlpack_device__()


class DeviceTensor:
    def __dlpack__(self, **options):
        raise BufferError("not for the host")

    def __dlpack_device__(self):
        return (2, 0)


@pytest.mark.parametrize(
    "slots",
    [
        [5, 6, -1, 9],
        (5, 6, -1, 9),
        np.array([5, 6, -1, 9]),
        np.array([5, 6, -1, 9], dtype=np.int32),
        np.array([5, 0, 6, 0, 9, 0])[::2],
        np.array([5, 6, 9], dtype=np.uint16),
        np.array([5, 6, -1, 9], dtype=">i8"),
        HostTensor(np.array([5, 6, -1, 9])),
        memoryview(np.array([5, 6, -1, 9])),
        range(5, 10, 2),
    ],
    ids=lambda slots: type(slots).__name__,
)
def test_slots_come_in_many_kinds(tracker, slots):
    tracker.record(0, slots)
    expected = [[5, 1], [7, 1], [9, 1]] if isinstance(slots, range) else [[5, 2], [9, 1]]
    assert collect(tracker) == expected


def test_slots_as_torch_tensors(tracker):
    torch = pytest.importorskip("torch")
    tracker.record(0, torch.tensor([5, 6, -1]))
    tracker.record(0, torch.arange(20, 30, dtype=torch.int32)[::3])
    assert collect(tracker) == [[5, 2], [20, 1], [23, 1], [26, 1], [29, 1]]


@pytest.mark.parametrize("nothing", [[], np.zeros(0), np.zeros(0, dtype=np.int64), [-1, -1]])
def test_nothing_may_be_recorded(tracker, nothing):
    tracker.record(0, nothing)
    assert collect(tracker) == []


@pytest.mark.parametrize(
    ("slots", "message"),
    [
        ([1, 2, 100], r"slots\[2\] is 100, expected -1 or 0 to 99"),
        ([-2], r"slots\[0\] is -2"),
        ([1.5], "dtype float64"),
        (np.array([1, 2], dtype=np.uint64), "dtype uint64"),
        (np.array([True]), "dtype bool"),
        (np.zeros((2, 2), dtype=np.int64), "2 dimensions"),
        (7, "0 dimensions"),
        (["a"], "dtype <U1"),
        (DeviceTensor(), "DLPack type 2"),
    ],
)
def test_bad_slots_are_refused(tracker, slots, message):
    with pytest.raises(InvalidArgumentError, match=message):
        tracker.record(0, slots)
    with pytest.raises(InvalidArgumentError, match=message):
        tracker.record_external(slots)
    assert tracker.open_externals == 0
    assert collect(tracker) == []


def test_ranges_and_blocks(tracker):
    tracker.record_ranges(0, as_ranges((90, 10), (0, 2), (50, 0)))
    tracker.record_ranges(0, [[3, 1]])
    tracker.record_blocks(0, [2, 1], 16)
    assert collect(tracker) == [[0, 2], [3, 1], [16, 32], [90, 10]]


@pytest.mark.parametrize(
    ("ranges", "message"),
    [
        (as_ranges((0, 1), (99, 2)), r"ranges\[1\] is \(begin 99, count 2\)"),
        (as_ranges((5, 2**64 - 1)), r"ranges\[0\]"),
        (np.array([[0, -1]]), r"ranges\[0\] is \(begin 0, count -1\)"),
        (np.array([[0.0, 1.0]]), "dtype float64"),
        (np.array([0, 1], dtype=np.uint64), r"shape \(2,\)"),
        (np.zeros((1, 3), dtype=np.uint64), r"shape \(1, 3\)"),
    ],
)
def test_bad_ranges_are_refused(tracker, ranges, message):
    for call in (
        lambda: tracker.record_ranges(0, ranges),
        lambda: tracker.record_external_ranges(ranges),
        lambda: tracker.restore(ranges),
    ):
        with pytest.raises(InvalidArgumentError, match=message):
            call()
    assert collect(tracker) == []


def test_bad_blocks_are_refused(tracker):
    for call in (
        lambda ids, size: tracker.record_blocks(0, ids, size),
        tracker.record_external_blocks,
    ):
        with pytest.raises(InvalidArgumentError, match=r"ids\[1\] is 6"):
            call([0, 6], 16)
        with pytest.raises(InvalidArgumentError, match=r"ids\[0\] is -1"):
            call([-1], 16)
        with pytest.raises(InvalidArgumentError, match="block_size is 0"):
            call([0], 0)
    assert collect(tracker) == []


def test_misuse_is_refused(tracker):
    with pytest.raises(InvalidArgumentError, match="num_slots is 0"):
        DirtyTracker(0)
    with pytest.raises(InvalidArgumentError, match="next_seq is -1"):
        DirtyTracker(1, next_seq=-1)
    with pytest.raises(InvalidArgumentError, match="seq is 0, expected 1"):
        tracker.open(0)
    with pytest.raises(InvalidArgumentError, match="step 3 was not opened"):
        tracker.record(3, [1])
    with pytest.raises(InvalidArgumentError, match="step 3 was not opened"):
        tracker.seal(3)
    tracker.seal(0)
    with pytest.raises(InvalidArgumentError, match="step 0 is sealed already"):
        tracker.record(0, [1])
    with pytest.raises(InvalidArgumentError, match="step 0 is sealed already"):
        tracker.seal(0)
    with pytest.raises(InvalidArgumentError, match="step 0 is sealed"):
        tracker.hold_from(0)
    with pytest.raises(InvalidArgumentError, match="token 9"):
        tracker.seal_external(9)
    with pytest.raises(InvalidArgumentError, match="next_seq is -5"):
        tracker.reset(-5)
    tracker.hold_from(4)
    with pytest.raises(BusyError, match="steps from 4"):
        tracker.hold_from(5)


def test_collected_ranges_outlive_the_tracker(tracker):
    tracker.record(0, [1, 3])
    tracker.seal(0)
    ranges = tracker.collect().ranges
    assert ranges.dtype == np.uint64
    assert ranges.shape == (2, 2)
    del tracker
    assert ranges.tolist() == [[1, 1], [3, 1]]
    assert DirtyTracker(5).collect().ranges.shape == (0, 2)


def test_tracker_describes_itself():
    tracker = DirtyTracker(1 << 16, next_seq=5)
    assert tracker.num_slots == 1 << 16
    assert tracker.next_seq == 5
    assert tracker.sealed_through == 4
    assert 2 * (1 << 16) // 8 <= tracker.memory_bytes < 20_000


def test_writers_and_a_collector_lose_nothing():
    """Every thread writes a value and seals; what is collected last must be the newest."""
    num_slots, steps = 512, 600
    tracker = DirtyTracker(num_slots)
    source, target = np.zeros(num_slots, dtype=np.int64), np.zeros(num_slots, dtype=np.int64)
    order, done = threading.Lock(), threading.Event()

    def write(seed):
        random = np.random.default_rng(seed)
        while True:
            with order:
                seq = tracker.next_seq
                if seq == steps:
                    return
                tracker.open(seq)
            slots = random.choice(num_slots // 3, 5, replace=False) * 3 + seed
            tracker.record(seq, slots)
            source[slots] += 1
            tracker.seal(seq)

    def copy():
        for begin, count in tracker.collect().ranges.tolist():
            target[begin : begin + count] = source[begin : begin + count]

    def patch():
        while not done.is_set():
            copy()

    writers = [threading.Thread(target=write, args=(i,)) for i in range(3)]
    patcher = threading.Thread(target=patch)
    for thread in [*writers, patcher]:
        thread.start()
    for thread in writers:
        thread.join()
    done.set()
    patcher.join()
    copy()
    assert tracker.sealed_through == steps - 1
    assert source.sum() == steps * 5
    np.testing.assert_array_equal(source, target)


pairs = st.lists(st.tuples(st.integers(0, 60), st.integers(0, 9)), max_size=8)


def members(ranges):
    return {slot for begin, count in ranges.tolist() for slot in range(begin, begin + count)}


@given(a=pairs, b=pairs, block_size=st.integers(1, 20))
def test_range_arithmetic_is_set_arithmetic(a, b, block_size):
    first, second = merge_ranges(as_ranges(*a)), merge_ranges(as_ranges(*b))
    assert members(first) == members(as_ranges(*a))
    assert all(first[1:, 0] > (first[:-1, 0] + first[:-1, 1]))
    assert members(intersect_ranges(first, second)) == members(first) & members(second)
    touched = {slot // block_size for slot in members(first)}
    assert blocks_touched(first, block_size).tolist() == sorted(touched)
    blocks = ranges_of_blocks([begin for begin, _ in a], block_size)
    assert members(blocks) == {begin * block_size + i for begin, _ in a for i in range(block_size)}


def test_bad_range_arguments_are_refused():
    touching = as_ranges((0, 1), (1, 1))
    good = as_ranges((0, 1))
    for call in (
        lambda: merge_ranges(as_ranges((1, 2**64 - 1))),
        lambda: intersect_ranges(touching, good),
        lambda: intersect_ranges(good, touching),
        lambda: blocks_touched(touching, 16),
        lambda: blocks_touched(good, 0),
        lambda: ranges_of_blocks([-1], 16),
        lambda: ranges_of_blocks([1], 0),
    ):
        with pytest.raises(InvalidArgumentError):
            call()

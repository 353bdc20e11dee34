import threading

import msgspec
import pytest

import pipelive_kv as pk
from pipelive_kv import messages
from pipelive_kv.record import Decision, FileDecisionRecord
from pipelive_kv.scheduler import runs_of
from pipelive_kv.stage.session import StageSession


@pytest.fixture
def scheduler():
    made = pk.Scheduler(pk.Placement.from_counts([2, 2]), allocator=pk.BlockAllocator(32, 16))
    yield made
    made.close()


def test_steps_are_numbered(scheduler):
    stamps = [scheduler.stamp() for _ in range(3)]
    assert [stamp.seq for stamp in stamps] == [0, 1, 2]
    assert {(s.epoch, s.resize, s.capacity, s.moves) for s in stamps} == {(0, 0, 16, ())}
    content = msgspec.msgpack.encode(stamps[2])
    assert msgspec.msgpack.decode(content, type=pk.Stamp) == stamps[2]


def test_freed_ids_wait_for_the_steps_before(scheduler):
    (block,) = scheduler._allocator.allocate(1)
    stamp = scheduler.stamp()
    scheduler.freed([block])
    assert block not in scheduler._allocator.allocate(5)
    scheduler.retired(stamp.seq)
    assert block in scheduler._allocator.allocate(1)


def test_a_step_needs_the_one_before_unless_the_engine_promises_more():
    placement = pk.Placement.from_counts([2, 2])
    plain = pk.Scheduler(placement, allocator=pk.BlockAllocator(32, 16))
    lanes = pk.Scheduler(placement, allocator=pk.BlockAllocator(32, 16), reads_retired=True)
    for made, expected in ((plain, [None] * 4), (lanes, [-1, -1, 0, 1])):
        found = []
        for seq in range(4):
            if seq >= 2:
                made.retired(seq - 2)
            found.append(made.stamp().needs)
        assert found == expected
        made.close()


def test_what_another_thread_tells_counts_from_the_next_stamp_on():
    """A step that is being built may not use what its stamp does not know to have retired."""
    allocator = pk.BlockAllocator(32, 16)
    made = pk.Scheduler(pk.Placement.from_counts([2, 2]), allocator=allocator, defers_hazards=True)
    (block,) = allocator.allocate(1)
    made.stamp()
    made.freed([block])
    assert made.stamp().needs == -1
    listening = threading.Thread(target=made.retired, args=(0,))
    listening.start()
    listening.join()
    assert block not in allocator.allocate(3)
    assert made.stamp().needs == 0
    assert block in allocator.allocate(1)
    made.retired(1)
    assert made.stamp().needs == 1
    made.close()


def test_steps_under_way_at_the_switchover_are_hazards(tmp_path):
    made = pk.Scheduler(
        pk.Placement.from_counts([2, 2]),
        allocator=pk.BlockAllocator(32, 16),
        defers_hazards=True,
        record=pk.FileDecisionRecord(tmp_path),
    )
    for _ in range(3):
        made.stamp()
    made.retired(0)
    placement = pk.Placement.from_counts([3, 1])
    made._handle(messages.Propose(1, placement.stages, "", 0, 60.0))
    assert not any(made.is_hazard(seq) for seq in range(3))
    made._handle(messages.Settle(1, commit=True))
    assert (made.stamp().epoch, made.epoch) == (1, 1)
    assert [made.is_hazard(seq) for seq in range(-1, 4)] == [False, False, True, True, False]
    made.retired(1)
    assert [made.is_hazard(seq) for seq in range(4)] == [False, False, True, False]
    made.stamp()
    made.retired(2)
    assert not any(made.is_hazard(seq) for seq in range(5))
    made.close()


class _Target:
    """Stands for the session's target side."""

    def __init__(self):
        self.layers = (0,)
        self.waited = []

    def gate(self, layer, through, timeout):
        self.waited.append(through)


@pytest.mark.parametrize(("needs", "through"), [(3, 3), (7, 7), (8, 7), (20, 7), (-1, -1)])
def test_the_gate_waits_for_the_old_placements_steps_at_most(needs, through):
    placement = pk.Placement.from_counts([2, 2])
    session = StageSession(1, 0, placement, placement, _Target())
    session.gate(0, needs, 1.0)
    assert session.target.waited == []  # the old placement still runs
    session.switch(8)
    session.gate(0, needs, 1.0)
    assert session.target.waited == [through]


def test_bad_calls(scheduler):
    with pytest.raises(pk.InvalidArgumentError, match="seq=0"):
        scheduler.retired(0)
    scheduler.stamp()
    with pytest.raises(pk.InvalidArgumentError, match="seq=1"):
        scheduler.retired(1)
    with pytest.raises(pk.PipeliveError):
        scheduler.freed([9])
    scheduler.close()
    with pytest.raises(pk.ClosedError):
        scheduler.stamp()


def test_close_twice(scheduler):
    scheduler.close()
    scheduler.close()
    assert threading.active_count() >= 1


def test_runs():
    assert runs_of([]) == ()
    assert runs_of([0, 1, 2, 5, 7, 8]) == ((0, 3), (5, 1), (7, 2))


def test_word_that_comes_as_the_wait_ends_is_not_taken_twice(scheduler, monkeypatch, tmp_path):
    """The wait for it has ended without it, and it comes before the record is looked at."""
    stages = ((0,), (1, 2, 3))
    decision = Decision(1, "commit", step=0, stages=stages)
    scheduler._handle(messages.Propose(1, stages, str(tmp_path), 0, 60.0))
    FileDecisionRecord(tmp_path).decide(decision)
    wait = scheduler._lock.wait

    def late(timeout=None):
        wait(0.001)
        scheduler._handle(messages.Settle(1, commit=True))
        return False

    monkeypatch.setattr(scheduler._lock, "wait", late)
    assert scheduler.stamp().epoch == 1

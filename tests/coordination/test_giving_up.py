"""When rounds of patches are enough, when the engine is asked for less, and when it is given up."""

import errno
import math
import os
import threading
import time

import numpy as np
import pytest
from simulation import Pipeline

import pipelive_kv as pk
from pipelive_kv.migration import RoundStats
from pipelive_kv.stage.background import Background
from pipelive_kv.stage.outgoing import Outgoing
from pipelive_kv.stage.source import SourceSession

SLOT_BYTES = 1000


class Sender:
    """A connection of one megabyte per second; the engine runs a step while a round is sent.

    ``writes`` has the slots of each step; None waits until the engine goes on.
    """

    def __init__(self, tracker, writes):
        self.tracker = tracker
        self.writes = list(writes)
        self.session = None
        self.seq = 0
        self.slot_bytes = SLOT_BYTES
        self.channel = self
        self.go_on = threading.Event()

    def send_round(self, number, through, ranges, timeout):
        slots = int(ranges[:, 1].sum())
        if self.writes and self.writes[0] is None:
            self.writes.pop(0)
            assert self.go_on.wait(timeout=60)
        if self.writes:
            self.tracker.open(self.seq)
            self.tracker.record(self.seq, np.arange(self.writes.pop(0), dtype=np.int64))
            self.tracker.seal(self.seq)
            self.session.sealed(self.seq)
            self.seq += 1
        sent = slots * SLOT_BYTES
        return RoundStats(1, 1, sent, slots, 0, sent / 1e6)

    def wait_applied(self, through, timeout):
        pass

    def finish(self, timeout):
        pass

    def cancel(self):
        self.go_on.set()

    def close(self):
        pass


@pytest.fixture
def source():
    made = []

    def make(writes, *, max_stop_ms, max_rounds=100):
        tracker = pk.DirtyTracker(4096)
        sender = Sender(tracker, writes)
        move = Outgoing(1, (0,), lambda timeout: sender, lambda channel: channel)
        move.open(60)
        session = SourceSession(
            1,
            tracker,
            [move],
            Background(),
            sealed=-1,
            block_size=4,
            verify=False,
            ends_at=time.monotonic() + 60,
        )
        sender.session = session
        made.append(session)
        session.start([(0, 100)], max_stop_ms=max_stop_ms, max_rounds=max_rounds, weights=None)
        return session

    yield make
    for session in made:
        session.cancel()


def test_rounds_that_shrink_converge(source):
    session = source([400, 200, 100, 50, 10, 2], max_stop_ms=5)
    found = session.await_converged(60)
    assert not found.stalled
    assert found.predicted_stop_ms <= 5
    parts = found.fixed_ms + found.bytes_ms + found.records_ms
    assert parts == pytest.approx(found.predicted_stop_ms)
    assert found.fixed_ms == pytest.approx(1.0)
    assert found.bytes_ms == pytest.approx(2.0, rel=0.2)


def test_rounds_without_gain_are_told_and_go_on(source):
    session = source([100] * 6 + [None, 1], max_stop_ms=5)
    found = session.await_converged(60)
    assert found.stalled
    assert found.predicted_stop_ms > 5
    session.outgoing[0].sender.go_on.set()
    while found.stalled:  # the engine has been throttled, or not: what counts is what it writes
        found = session.await_converged(60)
    assert found.predicted_stop_ms <= 5
    predicted = [record.predicted_stop_ms for record in session.rounds if record.number]
    assert predicted[0] > 5 >= predicted[-1]


def test_too_many_rounds_say_what_was_predicted(source):
    session = source([100] * 20, max_stop_ms=5, max_rounds=8)

    def wait():
        while session.await_converged(60).stalled:
            pass

    with pytest.raises(pk.DeadlineError, match=r"in 8 rounds: .* predicted stop time is 1\d\d"):
        wait()


def test_a_promise_outlasts_the_deadline(source):
    session = source([10], max_stop_ms=50)
    session.await_converged(60)
    session.promise()
    assert session._state.ends_at == math.inf


# -- through the coordinator ---------------------------------------------------------------------


@pytest.fixture
def pipeline(tmp_path):
    made = Pipeline([4, 2], tmp_path / "record", seed=os.getpid())
    made.run(10)
    made.drain()
    yield made
    made.close()


def _step(p):
    p.step()
    p.drain()
    while len(p.allocator.live()) > 20:
        p.scheduler.freed(p.sequences.pop(0).blocks)


def _move(p, counts, on_phase=None, **options):
    job = p.coordinator.reconfigure(
        pk.Placement.from_counts(counts),
        timeout=60,
        options=pk.MigrationOptions(**{"max_stop_ms": 100, **options}),
        on_phase=on_phase,
    )
    while not job.is_over:
        _step(p)
    return job


def test_the_engine_is_asked_for_less_and_released_when_it_is_given_up(pipeline):
    shares = []
    pipeline.scheduler.on_throttle(shares.append)
    # The fixed part of every prediction is a millisecond, so this limit is never met.
    job = _move(pipeline, [2, 4], max_stop_ms=0.5, max_rounds=12, min_throttle=0.25)
    with pytest.raises(pk.DeadlineError, match=r"phase patching: stage/0: .*in 12 rounds"):
        job.wait(timeout=1)
    assert job.phase is pk.Phase.ABORTED
    assert shares == [0.5, 0.25, 1.0]
    assert pipeline.scheduler.throttle == 1.0
    assert job.report.throttle == 0.25
    pipeline.check(pk.Placement.from_counts([4, 2]))


def test_a_throttle_ends_with_the_coordinator(pipeline):
    released = threading.Event()
    throttled = threading.Event()

    def on_throttle(share):
        (released if share == 1 else throttled).set()

    pipeline.scheduler.on_throttle(on_throttle)
    job = pipeline.coordinator.reconfigure(
        pk.Placement.from_counts([2, 4]),
        timeout=60,
        options=pk.MigrationOptions(max_stop_ms=0.5, max_rounds=10**6),
    )
    while not throttled.is_set():
        _step(pipeline)
    job.cancel()
    pipeline.coordinator.close()
    assert released.wait(timeout=60)
    assert pipeline.scheduler.throttle == 1.0


def test_too_many_seconds(pipeline):
    job = _move(pipeline, [2, 4], max_stop_ms=0.5, max_rounds=10**6, max_seconds=0.3)
    with pytest.raises(pk.DeadlineError, match=r"had not come to converge after 0.* ms, the limit"):
        job.wait(timeout=1)


def test_the_report_splits_the_stop_time(pipeline):
    report = _move(pipeline, [2, 4]).wait(timeout=1)
    predicted, actual = report.predicted_stop, report.actual_stop
    assert 0 < predicted.total_s <= 0.1
    assert predicted.total_s == pytest.approx(report.predicted_stop_s)
    assert actual.total_s == pytest.approx(actual.decision_s + report.stop_s)
    assert actual.activate_s > 0
    assert actual.gate_s == pytest.approx(actual.in_flight_s + actual.transfer_s)
    assert 0 <= actual.in_flight_s <= actual.gate_s
    assert report.stages[0].tail_s > 0
    assert report.stages[1].tail_s == 0  # it gave nothing away
    assert report.rounds[-1].write_through


def test_a_dry_run_changes_nothing(pipeline):
    before = [worker.pool.page_pool.stats().used_bytes for worker in pipeline.workers]
    job = _move(pipeline, [2, 4], dry_run=True)
    report = job.wait(timeout=1)
    assert job.phase is pk.Phase.ABORTED
    assert report.dry_run
    assert report.converged
    assert [span.phase.value for span in report.phases][-2:] == ["armed", "aborting"]
    pipeline.check(pk.Placement.from_counts([4, 2]))
    assert [worker.pool.page_pool.stats().used_bytes for worker in pipeline.workers] == before
    assert not _move(pipeline, [2, 4]).wait(timeout=1).dry_run


def test_a_pause_before_the_decision(pipeline):
    job = pipeline.coordinator.reconfigure(
        pk.Placement.from_counts([2, 4]),
        timeout=60,
        options=pk.MigrationOptions(max_stop_ms=100, pause=True),
    )
    while job.phase is not pk.Phase.ARMED:
        _step(pipeline)
    for _ in range(30):
        _step(pipeline)
    assert job.phase is pk.Phase.ARMED
    assert pipeline.scheduler.epoch == 0
    job.proceed()
    while not job.phase.is_final:
        _step(pipeline)
    job.wait(timeout=1)
    pipeline.check(pk.Placement.from_counts([2, 4]))


class Disk(pk.FileDecisionRecord):
    """A record on a disk that may be full."""

    full = False

    def decide(self, decision):
        if self.full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.directory))
        return super().decide(decision)


def test_a_decision_that_cannot_be_recorded(tmp_path):
    disk = Disk(tmp_path)
    pipeline = Pipeline([4, 2], disk, seed=os.getpid())
    try:
        pipeline.run(10)
        _move(pipeline, [3, 3]).wait(timeout=1)
        before = [worker.pool.page_pool.stats().used_bytes for worker in pipeline.workers]
        disk.full = True
        for _ in range(2):
            job = _move(pipeline, [2, 4])
            assert job.phase is pk.Phase.ABORTED
            with pytest.raises(pk.PipeliveError, match=f"in phase armed.*No space.*{tmp_path}"):
                job.wait(timeout=1)
            for _ in range(10):
                _step(pipeline)
            pipeline.check(pk.Placement.from_counts([3, 3]))
            after = [worker.pool.page_pool.stats().used_bytes for worker in pipeline.workers]
            assert after == before
        disk.full = False
        _move(pipeline, [2, 4]).wait(timeout=1)
        pipeline.check(pk.Placement.from_counts([2, 4]))
    finally:
        pipeline.close()


def test_a_record_that_only_the_coordinator_has(tmp_path):
    pipeline = Pipeline([4, 2], Disk(tmp_path), seed=os.getpid())
    try:
        pipeline.scheduler._record = None
        with pytest.raises(pk.InvalidArgumentError, match="record is not given"):
            _move(pipeline, [2, 4]).wait(timeout=1)
        pipeline.check(pk.Placement.from_counts([4, 2]))
    finally:
        pipeline.close()


@pytest.mark.parametrize("both", [True, False])
def test_a_coordinator_has_one_record(tmp_path, both):
    given = {"record": Disk(tmp_path), "record_dir": tmp_path} if both else {}
    with pytest.raises(pk.InvalidArgumentError, match="expected one of them"):
        pk.Coordinator(
            pk.ControlEndpoint("tcp://127.0.0.1:*", pk.ControlKey.generate()), pp_size=2, **given
        )


def test_a_pause_can_be_cancelled(pipeline):
    def on_phase(phase):
        if phase is pk.Phase.ARMED:
            reached.set()

    reached = threading.Event()
    job = pipeline.coordinator.reconfigure(
        pk.Placement.from_counts([2, 4]),
        timeout=60,
        options=pk.MigrationOptions(max_stop_ms=100, pause=True),
        on_phase=on_phase,
    )
    while not reached.is_set():
        _step(pipeline)
    job.cancel()
    with pytest.raises(pk.CancelledError, match="phase armed"):
        job.wait(timeout=60)
    pipeline.check(pk.Placement.from_counts([4, 2]))


@pytest.mark.parametrize(
    ("name", "value"), [("max_seconds", -1.0), ("min_throttle", 0.0), ("min_throttle", 1.5)]
)
def test_bad_options(name, value):
    with pytest.raises(pk.InvalidArgumentError, match=f"{name} is {value}"):
        pk.MigrationOptions(**{name: value})

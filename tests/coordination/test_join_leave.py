"""Stages come to a running pipeline and leave it; no step is lost, and nobody restarts."""

import time

import pytest
from simulation import Pipeline

import pipelive_kv as pk


@pytest.fixture
def pipeline(tmp_path):
    made = Pipeline([4, 2], tmp_path / "record", budget=8 * 5 * 4096, seed=11)
    made.run(20)
    yield made
    made.close()


def _move(p, counts, **options):
    target = pk.Placement.from_counts(counts)
    job = p.coordinator.reconfigure(
        target, timeout=60, options=pk.MigrationOptions(max_stop_ms=100, **options)
    )
    p.run_until(job)
    report = job.wait(timeout=1)
    p.check(target)
    p.read_all()
    return report


def test_a_third_stage_comes_and_the_first_one_goes(pipeline):
    p = pipeline
    p.join(2)
    assert p.coordinator.stages == (0, 1, 2)
    p.run(10)
    _move(p, [2, 2, 2])
    p.run(10)
    _move(p, [0, 3, 3])
    p.leave(0)
    assert p.coordinator.stages == (1, 2)
    p.run(10)
    _move(p, [0, 5, 1])
    with pytest.raises(pk.BusyError, match=r"stage 2 cannot leave: it holds layers \(5,\)"):
        p.leave(2)
    _move(p, [0, 6, 0])
    p.leave(2)
    p.run(10)
    # And back again, in front of the one that stayed.
    p.join(0)
    _move(p, [3, 3, 0])
    assert [worker.stage.pp_rank for worker in p.workers] == [0, 1]


def test_the_epoch_and_the_resizes_are_taken_over(pipeline, tmp_path):
    p = pipeline
    _move(p, [2, 4])
    p.coordinator.recover(30)  # gives an epoch up, which the new one must refuse as well
    p.join(2, capacity=13)
    joined = p.workers[2].stage
    assert joined.epoch == p.scheduler.epoch == 1
    assert joined.given_up == 2
    assert joined.pool.capacity == p.allocator.capacity
    report = _move(p, [1, 3, 2])
    assert report.epoch == 3


def test_a_new_coordinator_is_told_who_is_there(pipeline, tmp_path):
    p = pipeline
    p.join(2)
    _move(p, [0, 3, 3])
    p.leave(0)
    old, address = p.coordinator, p.coordinator.endpoint
    old.close()
    p.coordinator = _take_the_place(address, record_dir=tmp_path / "record", ranks=[2, 1, 2])
    p.coordinator.await_ready(60)
    assert p.coordinator.stages == (1, 2)
    assert p.coordinator.recover(60) == ()
    _move(p, [0, 2, 4])
    with pytest.raises(pk.InvalidArgumentError, match="ranks is"):
        pk.Coordinator(address, pp_size=2, record_dir=tmp_path, ranks=[])


def _take_the_place(address, **more):
    """The system may take a moment to let go of the address."""
    end = time.monotonic() + 60
    while True:
        try:
            return pk.Coordinator(address, pp_size=2, **more)
        except pk.ClosedError:
            if time.monotonic() > end:
                raise
            time.sleep(0.05)


def test_it_takes_part_in_a_shrink(tmp_path):
    p = Pipeline([4, 2], tmp_path / "record", budget=4 * 5 * 4096, seed=3)
    p.most_live = 20
    try:
        p.run(20)
        _move(p, [1, 5])
        assert p.allocator.capacity == 32
        p.join(2)
        assert p.workers[2].pool.capacity == 32
        _move(p, [1, 1, 4])
        assert p.allocator.capacity == 40
        assert _move(p, [0, 5, 1]).capacity_during == 32
        _move(p, [2, 2, 2])
        assert {worker.pool.capacity for worker in p.workers} == {40}
    finally:
        p.close()


def test_one_that_never_comes_changes_nothing(pipeline):
    p = pipeline
    with pytest.raises(pk.DeadlineError, match="no word from stage/2"):
        p.coordinator.add_stage(2, lambda: None, timeout=0.3)
    assert p.coordinator.stages == (0, 1)
    with pytest.raises(RuntimeError, match="on purpose"):
        p.coordinator.add_stage(2, _fail, timeout=5)
    with pytest.raises(pk.InvalidArgumentError, match=r"layers on stage 2, expected stages"):
        _move(p, [2, 2, 2])
    _move(p, [2, 4])


def _fail():
    raise RuntimeError("on purpose")


def test_one_of_another_shape_is_refused(pipeline):
    p = pipeline
    with pytest.raises(pk.ProtocolError, match="'max_blocks': 64"):
        p.join(2, max_blocks=64)
    assert p.coordinator.stages == (0, 1)


def test_one_at_a_time(pipeline):
    p = pipeline

    def attach():
        with pytest.raises(pk.BusyError, match="stage 2 joins"):
            p.coordinator.reconfigure(pk.Placement.from_counts([2, 4]))
        with pytest.raises(pk.BusyError, match="stage 2 joins"):
            p.coordinator.remove_stage(1, lambda: None)
        raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError):
        p.coordinator.add_stage(2, attach, timeout=5)
    job = p.coordinator.reconfigure(
        pk.Placement.from_counts([2, 4]), options=pk.MigrationOptions(max_stop_ms=100, pause=True)
    )
    with pytest.raises(pk.BusyError, match="another reconfiguration"):
        p.coordinator.add_stage(2, attach)
    job.proceed()
    p.run_until(job)
    job.wait(1)
    for rank in (1, -1):
        with pytest.raises(pk.InvalidArgumentError, match=f"rank is {rank}"):
            p.coordinator.add_stage(rank, attach)
    with pytest.raises(pk.InvalidArgumentError, match="rank is 5"):
        p.coordinator.remove_stage(5, lambda: None)

"""The old placement can be taken up again at once, while a lease lasts."""

import random
import time

import pytest
from simulation import Pipeline

import pipelive_kv as pk

MANY = 10**6


def options(**more):
    return pk.MigrationOptions(max_stop_ms=1000, **more)


@pytest.fixture
def pipeline(tmp_path):
    made = []

    def make(counts, **more):
        made.append(Pipeline(counts, tmp_path / "record", **more))
        made[0].run(20)
        return made[0]

    yield make
    for one in made:
        one.close()


def move(pipeline, counts, **more):
    job = pipeline.coordinator.reconfigure(
        pk.Placement.from_counts(counts), timeout=60, options=options(**more)
    )
    pipeline.run_until(job)
    return job


def until(pipeline, ready):
    end = time.monotonic() + 60
    while not ready():
        assert time.monotonic() < end
        pipeline.step()


def called(pipeline, rank):
    return [name for name, _ in pipeline.workers[rank].hooks.log]


def test_the_way_back_needs_neither_weights_nor_bulk(pipeline):
    p = pipeline([4, 2])
    there = move(p, [2, 4], lease_steps=MANY)
    moved = there.wait(timeout=1).bytes_moved
    assert there.lease is not None
    until(p, lambda: there.lease.phase is pk.Phase.ARMED)
    p.run(20)
    before = called(p, 0)
    assert "retire" not in before  # it still has what it gave away
    back = p.coordinator.reconfigure(pk.Placement.from_counts([4, 2]))
    assert back is there.lease
    p.run_until(back)
    report = back.wait(timeout=1)
    assert (report.old, report.new) == (there.report.new, there.report.old)
    assert report.epoch == there.report.epoch + 1
    assert "prepare" not in called(p, 0)
    assert called(p, 1).count("retire") == 1
    assert report.rounds[0].slots < moved
    p.check(pk.Placement.from_counts([4, 2]))
    p.read_all()
    move(p, [1, 5]).wait(timeout=1)
    p.check(pk.Placement.from_counts([1, 5]))
    p.read_all()


def test_a_wish_before_the_lease_is_armed_is_not_lost(pipeline):
    p = pipeline([1, 2, 3])
    there = move(p, [3, 2, 1], lease_steps=MANY)
    there.wait(timeout=1)
    back = p.coordinator.reconfigure(pk.Placement.from_counts([1, 2, 3]))
    p.run_until(back)
    back.wait(timeout=1)
    p.check(pk.Placement.from_counts([1, 2, 3]))
    p.read_all()


def test_a_lease_ends_with_its_steps(pipeline):
    # 40 blocks take 5 pages a layer: the 6 layers of stage 1's union have room for fewer.
    p = pipeline([3, 3, 0], budget=20 * 4096)
    p.most_live = 16
    there = move(p, [0, 3, 3], lease_steps=30)
    report = there.wait(timeout=1)
    assert report.capacity_during == report.capacity_after < report.capacity_before
    lease = there.lease
    until(p, lambda: lease.is_over)
    assert p.scheduler.next_seq > report.step + 30
    with pytest.raises(pk.CancelledError, match="the lease ended with step"):
        lease.wait(timeout=1)
    p.run(5)
    p.check(pk.Placement.from_counts([0, 3, 3]))  # and nobody holds what it gave away
    assert called(p, 0).count("retire") == 1
    assert p.allocator.capacity == report.capacity_before
    p.read_all()


def test_a_lease_can_be_let_go(pipeline):
    p = pipeline([4, 2])
    there = move(p, [2, 4], lease_steps=MANY)
    there.wait(timeout=1)
    with pytest.raises(pk.BusyError, match="let the lease go"):
        p.coordinator.reconfigure(pk.Placement.from_counts([3, 3]))
    there.lease.cancel()
    until(p, lambda: there.lease.is_over)
    move(p, [3, 3]).wait(timeout=1)
    p.check(pk.Placement.from_counts([3, 3]))
    p.read_all()


def test_an_aborted_move_has_no_lease(pipeline):
    p = pipeline([4, 2])
    p.workers[1].hooks.fail_in = "prepare"
    there = move(p, [2, 4], lease_steps=MANY)
    with pytest.raises(pk.PipeliveError, match="on purpose"):
        there.wait(timeout=1)
    with pytest.raises(pk.CancelledError, match="there is no lease"):
        there.lease.wait(timeout=10)
    p.workers[1].hooks.fail_in = None
    move(p, [2, 4]).wait(timeout=1)
    p.check(pk.Placement.from_counts([2, 4]))


def test_a_coordinator_that_dies_before_the_way_back_leaves_nothing(pipeline, monkeypatch):
    p = pipeline([4, 2])
    monkeypatch.setattr(p.coordinator, "_lend", lambda job, lease, options: lease.end())
    move(p, [2, 4], lease_steps=MANY).wait(timeout=1)
    assert tuple(p.workers[0].pool.layers) == (0, 1, 2, 3)
    p.coordinator.recover(timeout=30)
    assert tuple(p.workers[0].pool.layers) == (0, 1)
    p.check(pk.Placement.from_counts([2, 4]))
    move(p, [4, 2]).wait(timeout=1)
    p.check(pk.Placement.from_counts([4, 2]))
    p.read_all()


@pytest.mark.parametrize("seed", range(4))
def test_there_and_back_and_there(pipeline, seed):
    chosen = random.Random(seed)
    p = pipeline([2, 2, 2], seed=seed)
    here = [2, 2, 2]
    for _ in range(4):
        there = chosen.choice([[4, 1, 1], [1, 4, 1], [0, 3, 3], [3, 0, 3]])
        if there == here:
            continue
        job = move(p, there, lease_steps=MANY, verify=chosen.random() < 0.3)
        job.wait(timeout=1)
        p.run(chosen.randrange(12))
        if chosen.random() < 0.6:
            back = p.coordinator.reconfigure(pk.Placement.from_counts(here))
            p.run_until(back)
            back.wait(timeout=1)
        else:
            job.lease.cancel()
            until(p, lambda job=job: job.lease.is_over)
            here = there
        p.read_all()
    p.check(pk.Placement.from_counts(here))

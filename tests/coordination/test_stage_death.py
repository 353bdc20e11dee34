"""A stage that holds no layer yet is killed while it is to take some over."""

import os
import threading

import pytest
from simulation import Pipeline
from stage_process import StageProcess

import pipelive_kv as pk

OLD, NEW = [3, 3, 0], [2, 2, 2]


# 40 blocks of 512 bytes are 5 pages a layer; stage 1 holds 4 layers while they move.
ENOUGH, TIGHT = 4 * 5 * 4096, 4 * 4 * 4096


@pytest.fixture
def pipeline(request, tmp_path):
    made = Pipeline(
        OLD,
        tmp_path / "record",
        seed=os.getpid(),
        remote=1,
        capacity=40,
        budget=getattr(request, "param", ENOUGH),
    )
    yield made
    made.close()


@pytest.fixture
def start(pipeline, tmp_path):
    pipeline.coordinator.endpoint.key.save(tmp_path / "key")
    started = []

    def make():
        endpoint = pipeline.coordinator.endpoint
        started.append(StageProcess(2, OLD, endpoint, tmp_path / "key"))
        pipeline.coordinator.await_ready(60)
        return started[-1]

    yield make
    for process in started:
        process.close()


def _reconfigure(pipeline, counts, on_phase=None, on_step=lambda: None):
    job = pipeline.coordinator.reconfigure(
        pk.Placement.from_counts(counts),
        timeout=120,
        options=pk.MigrationOptions(max_stop_ms=100),
        on_phase=on_phase,
    )
    while not job.phase.is_final:
        _step(pipeline)
        on_step()
    return job


def _step(pipeline):
    pipeline.step()
    pipeline.drain()
    while len(pipeline.allocator.live()) > 15:
        pipeline.scheduler.freed(pipeline.sequences.pop(0).blocks)


@pytest.mark.parametrize("phase", ["admitted", "staging", "patching", "write_through", "armed"])
def test_it_dies_without_harm(pipeline, start, phase):
    for _ in range(20):
        _step(pipeline)
    child = start()
    before = [worker.pool.page_pool.stats().used_bytes for worker in pipeline.workers]

    def on_phase(entered):
        if entered.value == phase:
            child.kill()

    job = _reconfigure(pipeline, NEW, on_phase)
    with pytest.raises(pk.PipeliveError, match=rf"phase {phase}: .*stage/2") as caught:
        job.wait(timeout=1)
    assert not isinstance(caught.value, pk.DeadlineError)
    assert job.phase is pk.Phase.ABORTED
    pipeline.check(pk.Placement.from_counts(OLD))
    pipeline.read_all()
    assert [w.pool.page_pool.stats().used_bytes for w in pipeline.workers] == before
    assert pipeline.allocator.capacity == 40
    sessions = ("pipelive-patch", "pipelive-apply", "pipelive-background")
    assert not [t.name for t in threading.enumerate() if t.name.startswith(sessions)]
    # Without it nothing can be moved, which is said by name; with a new one it can be begun again.
    job = pipeline.coordinator.reconfigure(pk.Placement.from_counts(NEW), timeout=0.2)
    with pytest.raises(pk.DeadlineError, match="no word from stage/2"):
        job.wait(timeout=60)


@pytest.mark.parametrize("pipeline", [TIGHT], indirect=True)
def test_the_capacity_is_raised_again_without_it(pipeline, start):
    for _ in range(20):
        _step(pipeline)
    child = start()
    seen = []

    def on_step():
        # It takes part in no step, so that everybody waits for it to shrink.
        if pipeline.allocator.capacity < 40 and not seen:
            seen.append(pipeline.allocator.capacity)
            child.kill()

    job = _reconfigure(pipeline, NEW, on_step=on_step)
    with pytest.raises(pk.ClosedError, match="phase admitted: stage/2 has gone"):
        job.wait(timeout=1)
    assert seen == [32]
    pipeline.check(pk.Placement.from_counts(OLD))
    assert pipeline.allocator.capacity == 40


def test_close_does_not_wait_for_the_dead(pipeline, start):
    child = start()
    reached = threading.Event()
    go_on = threading.Event()

    def on_phase(entered):
        if entered is pk.Phase.PATCHING:
            reached.set()
            go_on.wait(timeout=60)

    job = pipeline.coordinator.reconfigure(
        pk.Placement.from_counts(NEW), timeout=120, on_phase=on_phase
    )
    while not reached.is_set():
        _step(pipeline)
    child.kill()
    job.cancel()
    go_on.set()
    pipeline.coordinator.close()
    assert job.phase is pk.Phase.ABORTED

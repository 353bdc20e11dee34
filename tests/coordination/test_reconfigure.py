"""Reconfigurations over real stages and transports, without a model; see simulation.py."""

import gc
import os
import random
import threading

import pytest
from simulation import Pipeline

import pipelive_kv as pk


@pytest.fixture
def pipeline(tmp_path):
    made = []

    def make(counts, **options):
        seed = options.pop("seed", None)
        if seed is None:
            seed = random.SystemRandom().randrange(2**32)
        print("seed", seed)
        made.append(Pipeline(counts, tmp_path / f"record-{len(made)}", seed=seed, **options))
        return made[-1]

    yield make
    for pipeline in made:
        pipeline.close()


def _reconfigure(pipeline, counts, **options):
    target = pk.Placement.from_counts(counts)
    job = pipeline.coordinator.reconfigure(
        target, timeout=60, options=pk.MigrationOptions(max_stop_ms=50, **options)
    )
    pipeline.run_until(job)
    report = job.wait(timeout=1)
    pipeline.check(target)
    pipeline.read_all()
    return report


@pytest.mark.parametrize("transport", ["tcp", "shm"])
@pytest.mark.parametrize("mode", ["live", "stop_and_copy"])
def test_there_and_back(pipeline, transport, mode):
    p = pipeline([4, 2], transport=transport)
    p.run(20)
    report = _reconfigure(p, [2, 4], mode=mode)
    assert report.moves == (pk.Move((2, 3), 0, 1),)
    assert report.step > 0
    assert report.bytes_moved > 0
    assert [s.transport for s in report.stages] == [transport, ""]
    assert [record.number for record in report.rounds] == list(range(len(report.rounds)))
    _reconfigure(p, [4, 2], mode=mode)


def test_several_boundaries_in_both_directions(pipeline):
    p = pipeline([3, 3, 3])
    p.run(20)
    for counts in ([2, 5, 2], [4, 1, 4], [0, 9, 0], [3, 0, 6], [9, 0, 0], [1, 1, 7]):
        _reconfigure(p, counts)


def test_idle_engine(pipeline):
    p = pipeline([3, 3])
    p.run(10)
    p.drain()
    job = p.coordinator.reconfigure(pk.Placement.from_counts([1, 5]), timeout=30)
    p.run_until(job, idle=True)
    job.wait(timeout=1)
    p.check(pk.Placement.from_counts([1, 5]))
    p.read_all()


def test_switchover_that_changes_nothing(pipeline):
    p = pipeline([3, 3])
    p.run(10)
    report = _reconfigure(p, [3, 3])
    assert report.moves == ()
    assert report.bytes_moved == 0
    assert p.scheduler.epoch == 1


def test_checksums_prove_the_move(pipeline):
    p = pipeline([3, 3])
    p.run(20)
    report = _reconfigure(p, [1, 5], verify=True)
    assert report.stages[0].verified_slots > 0


def test_reports_name_the_phases_in_order(pipeline):
    p = pipeline([3, 3])
    p.run(10)
    seen = []
    job = p.coordinator.reconfigure(
        pk.Placement.from_counts([2, 4]), timeout=30, on_phase=seen.append
    )
    p.run_until(job)
    report = job.wait(timeout=1)
    order = [
        "admitted",
        "staging",
        "patching",
        "write_through",
        "armed",
        "switching",
        "releasing",
        "done",
    ]
    assert [phase.value for phase in seen] == order
    assert [span.phase.value for span in report.phases] == ["planned", *order[:-1]]
    assert all(span.end_ns >= span.start_ns for span in report.phases)


@pytest.mark.parametrize("hook", ["prepare", "warmup"])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_failing_hook_changes_nothing(pipeline, hook, rank):
    p = pipeline([4, 2])
    p.run(20)
    before = [worker.pool.page_pool.stats().used_bytes for worker in p.workers]
    p.workers[rank].hooks.fail_in = hook
    target = pk.Placement.from_counts([2, 4] if rank == 1 else [6, 0])
    job = p.coordinator.reconfigure(target, timeout=30)
    p.run_until(job)
    with pytest.raises(pk.PipeliveError, match=f"{hook} failed on purpose"):
        job.wait(timeout=1)
    assert job.phase is pk.Phase.ABORTED
    p.check(pk.Placement.from_counts([4, 2]))
    p.read_all()
    assert [worker.pool.page_pool.stats().used_bytes for worker in p.workers] == before
    p.workers[rank].hooks.fail_in = None
    _reconfigure(p, target.counts)


@pytest.mark.parametrize(
    "phase", ["admitted", "staging", "patching", "write_through", "armed", "switching"]
)
def test_cancel_in_each_phase(pipeline, phase):
    p = pipeline([4, 2])
    p.run(20)
    target = pk.Placement.from_counts([2, 4])
    ready = threading.Event()

    def on_phase(entered):
        if entered.value == phase:
            ready.wait(timeout=30)
            job.cancel()
            job.cancel()

    job = p.coordinator.reconfigure(target, timeout=30, on_phase=on_phase)
    ready.set()
    p.run_until(job)
    if phase == "switching":
        job.wait(timeout=1)
        p.check(target)
    else:
        with pytest.raises(pk.CancelledError):
            job.wait(timeout=1)
        p.check(pk.Placement.from_counts([4, 2]))
        assert p.scheduler.next_seq > 0
    p.read_all()
    _reconfigure(p, [1, 5])


def test_one_at_a_time(pipeline):
    p = pipeline([3, 3])
    job = p.coordinator.reconfigure(pk.Placement.from_counts([1, 5]), timeout=30)
    with pytest.raises(pk.BusyError, match="another reconfiguration"):
        p.coordinator.reconfigure(pk.Placement.from_counts([2, 4]), timeout=30)
    p.run_until(job)
    job.wait(timeout=1)


def test_a_decided_switchover_outlives_the_deadline(pipeline):
    p = pipeline([3, 3])
    p.run(5)
    p.drain()
    # No step is stamped, so the switchover is never reached and the first step never comes.
    job = p.coordinator.reconfigure(pk.Placement.from_counts([1, 5]), timeout=1.0)
    with pytest.raises(pk.DeadlineError, match="phase switching"):
        job.wait(timeout=2)
    # It was decided, so it holds, and the engine's next steps carry it.
    p.run_until(job)
    assert job.wait(timeout=1).step > 0
    p.check(pk.Placement.from_counts([1, 5]))
    p.read_all()


def test_shrinks_to_the_budget_and_grows_again(pipeline):
    # 40 blocks of 512 bytes are 5 pages a layer: 4 layers with all blocks fill the budget.
    p = pipeline([4, 2], budget=4 * 5 * 4096, capacity=40, max_blocks=40)
    p.most_live = 20
    p.run(30)
    report = _reconfigure(p, [1, 5])
    assert report.capacity_during == 32
    assert report.capacity_after == 32
    assert max(w.pool.page_pool.stats().peak_held_bytes for w in p.workers) <= 4 * 5 * 4096
    report = _reconfigure(p, [3, 3])
    assert report.capacity_after == 40
    assert p.allocator.capacity == 40


def test_weights_elsewhere_come_when_the_shrink_has_given_its_pages_back(pipeline):
    """Or the memory of both would be above the budget, which nobody could reuse pages to avoid."""
    budget = 4 * 5 * 4096 + 4 * 8192
    p = pipeline([4, 2], budget=budget, capacity=40, max_blocks=40, weights="elsewhere")
    p.most_live = 15
    p.run(30)
    for counts in ([1, 5], [4, 2], [5, 1], [3, 3]):
        _reconfigure(p, counts)
        for worker in p.workers:
            weights = worker.weights
            assert weights.layers == tuple(worker.pool.layers)
            assert worker.pool.page_pool.held_bytes <= budget - weights.BYTES * len(weights.layers)
    seen = [stats for worker in p.workers for stats in worker.weights.at_load]
    assert len(seen) >= 9
    assert all(stats.held_bytes == stats.used_bytes for stats in seen)


def test_loading_and_mapping_are_as_nice_as_told(pipeline):
    p = pipeline([4, 2], capacity=40, max_blocks=40, weights="elsewhere", background_nice=4)
    p.run(10)
    for counts in ([1, 5], [4, 2]):
        _reconfigure(p, counts)
    usual = os.getpriority(os.PRIO_PROCESS, 0)
    found = [niceness for worker in p.workers for niceness in worker.weights.niceness]
    assert found == [min(19, usual + 4)] * 6


def test_refused_where_the_live_blocks_do_not_fit(pipeline):
    p = pipeline([4, 2], budget=4 * 5 * 4096, capacity=40, max_blocks=40)
    held = p.allocator.allocate(38)
    p.run(3)
    p.drain()
    job = p.coordinator.reconfigure(pk.Placement.from_counts([1, 5]), timeout=30)
    p.run_until(job)
    with pytest.raises(pk.OverBudgetError):
        job.wait(timeout=1)
    assert p.allocator.capacity == 40
    p.check(pk.Placement.from_counts([4, 2]))
    p.scheduler.freed(held)


def test_a_shrink_of_several_steps(pipeline):
    p = pipeline([4, 2], budget=4 * 5 * 4096, capacity=40, max_blocks=40, moves_per_step=1)
    low = p.allocator.allocate(25)
    p.allocator.allocate(12)  # 26 to 37, of which 6 have to move
    p.most_live = 20
    p.scheduler.freed(low)
    report = _reconfigure(p, [1, 5])
    assert (report.capacity_during, report.blocks_moved) == (32, 6)
    assert max(w.pool.page_pool.stats().peak_held_bytes for w in p.workers) <= 4 * 5 * 4096


def test_a_shrink_that_is_cancelled_half_way_is_taken_back(pipeline):
    p = pipeline([4, 2], budget=4 * 5 * 4096, capacity=40, max_blocks=40, moves_per_step=1)
    low = p.allocator.allocate(25)
    p.allocator.allocate(12)
    p.most_live = 20
    p.scheduler.freed(low)
    job = p.coordinator.reconfigure(pk.Placement.from_counts([1, 5]), timeout=60)
    while p.allocator.capacity == 40:
        p.step(empty=True)
    assert p.allocator.capacity == 37
    p.drain()
    job.cancel()
    with pytest.raises(pk.CancelledError):
        job.wait(timeout=60)
    assert all(worker.pool.capacity == 40 for worker in p.workers)
    p.check(pk.Placement.from_counts([4, 2]))
    assert p.allocator.capacity == 40


def test_bad_wishes(pipeline):
    p = pipeline([3, 3])
    with pytest.raises(pk.InvalidArgumentError, match="expected a Placement"):
        p.coordinator.reconfigure([2, 4])
    with pytest.raises(pk.InvalidArgumentError, match="timeout is 0"):
        p.coordinator.reconfigure(pk.Placement.from_counts([2, 4]), timeout=0)
    for counts in ([2, 2, 2], [3, 4]):
        job = p.coordinator.reconfigure(pk.Placement.from_counts(counts), timeout=10)
        with pytest.raises(pk.InvalidArgumentError, match="layers on"):
            job.wait(timeout=30)
    with pytest.raises(pk.InvalidArgumentError, match="mode is 'cold'"):
        pk.MigrationOptions(mode="cold")
    p.check(pk.Placement.from_counts([3, 3]))


def test_nothing_is_left_behind(pipeline, tmp_path):
    p = pipeline([3, 3])
    p.run(10)
    _reconfigure(p, [1, 5])
    _reconfigure(p, [3, 3])
    before = _resources(p)
    for _ in range(5):
        _reconfigure(p, [1, 5])
        _reconfigure(p, [3, 3])
    after = _resources(p)
    assert after == before


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_back_and_forth_without_a_leak(pipeline, tmp_path):
    """Nothing grows: files, threads, pages, and what the process takes beside them."""
    moves = int(os.environ.get("LEAK_MOVES", "200"))
    p = pipeline([3, 3], budget=5 * 5 * 4096)
    p.run(10)
    placements = [pk.Placement.from_counts(counts) for counts in ([1, 5], [3, 3])]
    seen = []
    for number in range(moves):
        job = p.coordinator.reconfigure(
            placements[number % 2], timeout=60, options=pk.MigrationOptions(max_stop_ms=1000)
        )
        p.run_until(job)
        assert job.wait(timeout=1).placement == placements[number % 2]
        if number % (moves // 10) == moves // 10 - 1:
            p.check(placements[1])
            gc.collect()
            seen.append((_resources(p), _resident_kib()))
    assert len({resources for resources, _ in seen}) == 1
    early, late = seen[1][1], seen[-1][1]
    print("resident KiB after each tenth:", [kib for _, kib in seen])
    assert late - early < 16 << 10


def _resident_kib():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmRSS:"))


def _resources(p):
    used = tuple(worker.pool.page_pool.stats().used_bytes for worker in p.workers)
    # The control plane starts its few worker threads as they are needed, so they do not count.
    sessions = ("pipelive-patch", "pipelive-apply", "pipelive-background", "pipelive-reconfigure")
    threads = [t.name for t in threading.enumerate() if t.name.startswith(sessions)]
    return len(os.listdir("/proc/self/fd")), tuple(sorted(threads)), used

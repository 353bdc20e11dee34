"""Moves whose union does not fit beside the live blocks: in waves, or told what would fit."""

import pytest
from simulation import Pipeline

import pipelive_kv as pk

PAGES = 5  # of one layer with all 40 blocks
BUDGET = 4 * PAGES * 4096
OLD, NEW = pk.Placement.from_counts([0, 4, 4]), pk.Placement.from_counts([4, 4, 0])


@pytest.fixture
def pipeline(tmp_path):
    """Four layers with all blocks fit on a stage; the move would need eight on the second one."""
    made = Pipeline(OLD.counts, tmp_path / "record", budget=BUDGET, seed=7)
    made.held = made.allocator.allocate(26)
    made.most_live = 30
    made.run(10)
    made.drain()
    yield made
    made.close()


def _move(p, target=NEW, *, on_phase=None, **options):
    return p.coordinator.reconfigure(
        target,
        timeout=60,
        options=pk.MigrationOptions(max_stop_ms=100, **options),
        on_phase=on_phase,
    )


def test_a_large_move_goes_in_waves(pipeline):
    phases = []
    job = _move(pipeline, on_phase=phases.append)
    pipeline.run_until(job)
    report = job.wait(timeout=1)
    pipeline.check(NEW)
    pipeline.read_all()
    assert report.placement == NEW
    assert len(report.path) == len(report.waves) == 2
    assert report.path[-1] == NEW
    assert (report.old, report.new) == (OLD, NEW)
    assert [wave.old for wave in report.waves] == [OLD, report.path[0]]
    assert [wave.epoch for wave in report.waves] == [1, 2]
    assert pipeline.scheduler.epoch == report.epoch == 2
    assert phases.count(pk.Phase.DONE) == 1
    assert phases.count(pk.Phase.SWITCHING) == 2
    assert report.bytes_moved == sum(wave.bytes_moved for wave in report.waves) > 0
    assert [span.phase for span in report.phases].count(pk.Phase.STAGING) == 2
    assert report.capacity_after == pipeline.allocator.capacity == 40
    assert all(w.pool.page_pool.stats().peak_held_bytes <= BUDGET for w in pipeline.workers)


def test_the_capacity_stays_down_between_waves(pipeline):
    """Five layers have room for 32 blocks, which is known before the first wave begins."""
    while pipeline.sequences:
        pipeline.scheduler.freed(pipeline.sequences.pop().blocks)
    pipeline.step(empty=True)
    pipeline.drain()
    job = _move(pipeline, pk.Placement.from_counts([5, 3, 0]))
    pipeline.run_until(job, idle=True)
    report = job.wait(timeout=1)
    assert len(report.waves) > 1
    assert {wave.capacity_during for wave in report.waves} == {32}
    assert {wave.capacity_after for wave in report.waves} == {32}
    assert (report.capacity_before, report.capacity_after) == (40, 32)
    pipeline.check(report.new)
    pipeline.read_all()


def test_without_waves_it_is_refused_and_told_what_would_fit(pipeline):
    job = _move(pipeline, waves="off")
    pipeline.run_until(job)
    with pytest.raises(pk.OverBudgetError, match=r"stage 1 lacks \d+ bytes.*would fit: ") as found:
        job.wait(timeout=1)
    report = job.report
    (shortage,) = report.shortages
    assert (shortage.stage, shortage.layers) == (1, 8)
    assert shortage.lacking_bytes > 0
    assert str(shortage.lacking_bytes) in str(found.value)
    assert 1 <= len(report.would_fit) <= 3
    assert report.placement == OLD
    pipeline.check(OLD)
    job = _move(pipeline, report.would_fit[0], waves="off")
    pipeline.run_until(job)
    assert job.wait(timeout=1).waves == []
    pipeline.check(report.would_fit[0])


def test_no_way_at_all(pipeline):
    everything = pk.Placement.from_counts([0, 0, 8])
    job = _move(pipeline, everything)
    pipeline.run_until(job)
    with pytest.raises(pk.OverBudgetError, match="stage 2 lacks"):
        job.wait(timeout=1)
    assert job.report.would_fit
    assert everything not in job.report.would_fit
    pipeline.check(OLD)
    assert pipeline.allocator.capacity == 40


def test_an_abort_between_waves_leaves_a_valid_placement(pipeline):
    seen = []

    def on_phase(phase):
        seen.append(phase)
        if phase is pk.Phase.STAGING and seen.count(phase) == 2:
            job.cancel()
            job.cancel()

    job = _move(pipeline, on_phase=on_phase)
    pipeline.run_until(job)
    with pytest.raises(pk.CancelledError, match=r"wave 2 of 2 was given up, .* serves"):
        job.wait(timeout=1)
    report = job.report
    middle = report.path[0]
    assert report.placement == middle
    assert str(middle) in report.reason
    assert [wave.placement for wave in report.waves] == [middle, middle]
    pipeline.check(middle)
    pipeline.read_all()
    assert pipeline.allocator.capacity == 40
    back = _move(pipeline, OLD)
    pipeline.run_until(back)
    back.wait(timeout=1)
    pipeline.check(OLD)


def test_a_cancel_that_comes_after_the_decision_ends_the_next_wave(pipeline):
    def on_phase(phase):
        if phase is pk.Phase.SWITCHING:
            job.cancel()

    job = _move(pipeline, on_phase=on_phase)
    pipeline.run_until(job)
    with pytest.raises(pk.CancelledError, match="wave 2 of 2"):
        job.wait(timeout=1)
    pipeline.check(job.report.path[0])
    assert job.report.placement == job.report.path[0]
    assert pipeline.allocator.capacity == 40


def test_a_dry_run_of_waves_says_which_they_would_be(pipeline):
    job = _move(pipeline, dry_run=True)
    pipeline.run_until(job)
    report = job.wait(timeout=1)
    assert report.dry_run
    assert len(report.path) == 2
    assert len(report.waves) == 1
    assert report.placement == OLD
    pipeline.check(OLD)


def test_bad_choice():
    with pytest.raises(pk.InvalidArgumentError, match="waves is 'many'"):
        pk.MigrationOptions(waves="many")

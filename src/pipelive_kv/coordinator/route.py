"""The way to a placement: at once, or in waves, each a reconfiguration of its own."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from pipelive_kv.coordinator.job import Job
from pipelive_kv.coordinator.reconfiguration import Wave
from pipelive_kv.coordinator.recovery import Survey
from pipelive_kv.coordinator.report import Report
from pipelive_kv.errors import OverBudgetError, PipeliveError
from pipelive_kv.messages import StageInfo
from pipelive_kv.placement import Placement
from pipelive_kv.plan import StageBudget, plan
from pipelive_kv.waves import waves, would_fit


def budgets_of(stages: Iterable[StageInfo], num_stages: int) -> tuple[StageBudget, ...]:
    """What the stages have said that they can hold; nothing, where there is no stage."""
    found = {
        info.rank: StageBudget(
            info.budget_bytes,
            info.layer_bytes,
            info.block_bytes,
            page_bytes=info.page_bytes,
            stack=info.stack,
            other_bytes=info.other_bytes,
        )
        for info in stages
    }
    any_of_them = next(iter(found.values()))
    absent = replace(any_of_them, budget_bytes=0)
    return tuple(found.get(rank, absent) for rank in range(num_stages))


class Route:
    """What is carried out, wave by wave; where all fits at once there is one.

    The capacity goes down to what all waves have room for with the first one, and up again with the
    last one, so that no wave can find more live blocks than it was planned for.

    Args:
        job: gets its report here.
        found: how everybody stands.
        target: where to go.
        epoch: of the first wave; every wave takes the next one.
        in_waves: whether there may be more than one.
    """

    def __init__(
        self, job: Job, found: Survey, target: Placement, epoch: int, *, in_waves: bool
    ) -> None:
        scheduler = found.scheduler
        self._found = found
        self._old = Placement(scheduler.stages).padded(target.num_stages)
        self._in_waves = in_waves
        self._epoch = epoch
        self._budgets = budgets_of(found.stages, target.num_stages)
        self._first_capacity = self._room = scheduler.capacity
        self._limit = scheduler.capacity
        self._direct = plan(self._old, target, self._budgets, live_blocks=scheduler.live)
        self.path: tuple[Placement, ...] = (target,)
        if in_waves and not self._direct.fits:
            found_path = waves(self._old, target, self._budgets, live_blocks=scheduler.live)
            self.path = found_path or self.path
        if len(self.path) > 1:
            legs = zip((self._old, *self.path[:-1]), self.path, strict=True)
            self._limit = min(plan(*leg, self._budgets).blocks_during for leg in legs)
        job.begin(self._report_of(self._old, target, self.path))

    def begin(self, job: Job, number: int, found: Survey | None) -> Report:
        """The report of wave ``number``; ``found`` is how everybody stands after the last one."""
        if found is not None:
            self._found = found
            self._epoch += 1
        if len(self.path) == 1:
            return job.report
        new = self.path[number]
        report = self._report_of(self._serving(number), new, (new,))
        job.begin_wave(report, more=number + 1 < len(self.path))
        return report

    def wave(self, number: int) -> Wave:
        """How wave ``number`` stands to the others."""
        return Wave(
            capacity=self._found.scheduler.capacity,
            first_capacity=self._first_capacity,
            limit=self._limit,
            is_last=number + 1 == len(self.path),
        )

    def end(self, room: int) -> None:
        """A wave has ended; ``room`` blocks fit on every stage, if that came to be known."""
        if room > 0:
            self._room = min(self._first_capacity, room)

    def explained(self, job: Job, number: int, error: PipeliveError) -> PipeliveError:
        """``error`` with what would fit instead, and with where an aborted wave leaves all."""
        text, report = str(error), job.report
        if isinstance(error, OverBudgetError):
            report.shortages = self._direct.shortages
            report.would_fit = would_fit(
                self._old,
                self.path[-1],
                self._budgets,
                live_blocks=self._found.scheduler.live,
                in_waves=self._in_waves,
            )
            unsaid = [s for s in report.shortages if f"stage {s.stage} lacks" not in text]
            text = "; ".join([text, *map(str, unsaid)])
            if report.would_fit:
                text += f"; would fit: {', '.join(map(str, report.would_fit))}"
        if len(self.path) > 1:
            serving = self._serving(number)
            text += f"; wave {number + 1} of {len(self.path)} was given up, {serving} serves"
        return type(error)(text)

    def _serving(self, number: int) -> Placement:
        return self.path[number - 1] if number else self._old

    def _report_of(self, old: Placement, new: Placement, path: tuple[Placement, ...]) -> Report:
        now = self._found.scheduler.capacity
        return Report(
            self._epoch,
            old,
            new,
            tuple(old.moves_to(new)),
            # What an abort goes back to; after a wave the capacity is still as low as in it.
            capacity_before=max(self._room, now),
            capacity_during=now,
            capacity_after=now,
            path=path,
        )

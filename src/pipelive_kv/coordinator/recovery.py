"""What a new coordinator does about the reconfigurations that one before it has left."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass

from pipelive_kv.control import ControlServer
from pipelive_kv.coordinator.ending import Ending
from pipelive_kv.coordinator.fanout import SCHEDULER_NAME, Fanout, name_of
from pipelive_kv.coordinator.job import Job
from pipelive_kv.coordinator.report import Report
from pipelive_kv.errors import CancelledError, ClosedError, DeadlineError
from pipelive_kv.messages import Describe, DescribeScheduler, SchedulerInfo, StageInfo
from pipelive_kv.placement import Placement
from pipelive_kv.protocol import Phase, StageState
from pipelive_kv.record import Decision, DecisionRecord

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Survey:
    """What the stages and the scheduler say about themselves."""

    stages: tuple[StageInfo, ...]
    scheduler: SchedulerInfo

    @property
    def left(self) -> tuple[int, ...]:
        """The epochs for which something is under way, ascending."""
        found = {info.session for info in self.stages} | {self.scheduler.pending}
        return tuple(sorted(found - {-1}))

    @property
    def newest_epoch(self) -> int:
        """The highest epoch that anybody has heard of."""
        scheduler = max(self.scheduler.epoch, self.scheduler.newest_epoch)
        return max(scheduler, *(max(s.epoch, s.session, s.given_up) for s in self.stages))

    def placements_of(self, epoch: int) -> tuple[Placement, Placement]:
        """The placement before ``epoch`` and the one it brings, as far as anybody knows."""
        for info in self.stages:
            if info.session == epoch:
                return Placement(info.session_from), Placement(info.session_stages)
        current = Placement(self.scheduler.stages)
        return current, current


def survey(to: Fanout, timeout: float) -> Survey:
    """Ask everybody how they stand.

    Raises:
        DeadlineError: naming who does not answer.
    """
    to.server.await_participants([SCHEDULER_NAME, *to.stages], min(10.0, timeout))
    stages = to.all(lambda _: Describe(), StageInfo, timeout)
    return Survey(stages, to.scheduler(DescribeScheduler(), SchedulerInfo, timeout))


class Recovery:
    """Ends every epoch that was left, as the record says; what it does not know is given up."""

    def __init__(
        self,
        server: ControlServer,
        ranks: tuple[int, ...],
        record: DecisionRecord,
        timeout: float,
    ) -> None:
        self._server = server
        self._ranks = ranks
        self._record = record
        self._ends_at = time.monotonic() + timeout

    def run(self, *, fence: bool) -> tuple[Decision, ...]:
        """End what was left; returns what holds for each such epoch.

        Args:
            fence: give up the next epoch as well, on record and everywhere: whatever a coordinator
                that is believed dead has said and still says is refused from then on.
        """
        found = survey(Fanout(self._server, self._ranks), self._rest())
        ended = [self._end(epoch, found) for epoch in self.left(found)]
        if fence:
            newest = max(found.newest_epoch, self._record.newest_epoch())
            self._end(newest + 1, found)
        return tuple(ended)

    def left(self, found: Survey) -> tuple[int, ...]:
        """The epochs that are not ended, ascending."""
        served = self._record.read(found.scheduler.epoch)
        # All stages have released, but did not come to raise the capacity.
        growing = served is not None and served.capacity > found.scheduler.capacity
        last = {found.scheduler.epoch} if growing and not found.left else set()
        return tuple(sorted({*found.left, *last}))

    def _end(self, epoch: int, found: Survey) -> Decision:
        job = Job(self._rest(), start=Phase.RECOVERING)
        to = Fanout(self._server, self._ranks, job.course)
        # What an epoch that was ended before this one has changed must be seen.
        now = survey(to, self._rest())
        old, new = found.placements_of(epoch)
        scheduler = now.scheduler
        report = Report(
            epoch,
            old,
            new,
            tuple(old.moves_to(new)),
            capacity_before=max(scheduler.capacity_before, scheduler.capacity),
            capacity_during=scheduler.capacity,
            capacity_after=scheduler.capacity,
        )
        job.begin(report)
        ending = Ending(to, self._record, job, report, resize=scheduler.resize)
        reason = f"the coordinator of epoch {epoch} has gone"
        ending.abort(CancelledError(reason))
        decision = self._record.read(epoch)
        if decision is None:
            raise ClosedError(f"the decision of epoch {epoch} vanished from the record")
        _log.info("epoch %d was left unfinished; the record says %s", epoch, decision.outcome)
        if decision.outcome == "commit":
            job.check()
        else:
            self._check_taken_back(epoch)
        return decision

    def _check_taken_back(self, epoch: int) -> None:
        to = Fanout(self._server, self._ranks)
        open_ = [
            name_of(info.rank)
            for info in survey(to, self._rest()).stages
            if info.session == epoch and info.state != StageState.IDLE.value
        ]
        if open_:
            raise DeadlineError(f"{', '.join(open_)} still takes part in epoch {epoch}")

    def _rest(self) -> float:
        rest = self._ends_at - time.monotonic()
        if rest <= 0:
            raise DeadlineError("what a coordinator has left could not be ended in time")
        return rest

"""A lease: for some steps after a switchover, the old placement can be taken up again at once."""

from __future__ import annotations

import dataclasses
import logging

from pipelive_kv.coordinator.fanout import Fanout
from pipelive_kv.coordinator.job import Job
from pipelive_kv.coordinator.options import MigrationOptions
from pipelive_kv.coordinator.reconfiguration import Reconfiguration, Wave
from pipelive_kv.coordinator.report import Report
from pipelive_kv.errors import CancelledError
from pipelive_kv.messages import Observe, Progress
from pipelive_kv.protocol import Phase
from pipelive_kv.record import DecisionRecord

_log = logging.getLogger(__name__)

_LOOK_EVERY = 0.05
"""Seconds between two looks at how many steps have gone by."""

_IDLE_FOR = 86400.0
"""Seconds that a lease lasts where the engine runs no steps."""

_FINISH_WITHIN = 60.0
"""Seconds for the way back, once it is wanted."""

_STOPS_LOOKING = 5.0
"""Seconds for every stage to say how far it is."""


class LeaseEndError(CancelledError):
    """Nobody has wanted the old placement back."""


class Lease(Reconfiguration):
    """The way back, prepared up to its decision and held there.

    It is a reconfiguration like any other, of the next epoch: the new placement is the old one. Two
    things are cheaper: the stages have kept the layers that they gave away, and what they lack is
    what has been written since. So bulk, weights and preparation fall away, and from then on each
    step's slots flow back.
    """

    resume = True

    def __init__(
        self,
        fanout: Fanout,
        record: DecisionRecord,
        record_dir: str,
        job: Job,
        report: Report,
        options: MigrationOptions,
        ends_at_step: int,
    ) -> None:
        now = report.capacity_during
        super().__init__(
            fanout,
            record,
            record_dir,
            job,
            report,
            dataclasses.replace(options, mode="live", weights_from="source", pause=True),
            Wave(capacity=now, first_capacity=report.capacity_before, limit=now, is_last=True),
        )
        self._ends_at_step = ends_at_step
        # Not bound to a phase: looking is allowed in all of them.
        self._stages_now = Fanout(fanout.server, fanout.ranks)

    def carry_out(self) -> None:
        """Wait for the wish to go back, or for the end; the job is over when this returns."""
        try:
            self.until_decided()
        except Exception as error:
            if not isinstance(error, LeaseEndError):
                _log.info("the lease of epoch %d has ended: %s", self.epoch, error)
            self.abort(self.explained(error))
        else:
            self.complete()

    def _await_proceed(self) -> None:
        job = self._job
        job.extend(_IDLE_FOR)
        while not job.await_proceed(_LOOK_EVERY):
            found = self._stages_now.all(lambda _: Observe(), Progress, _STOPS_LOOKING)
            if max(progress.seq for progress in found) >= self._ends_at_step:
                raise LeaseEndError(f"the lease ended with step {self._ends_at_step}")
        job.extend(_FINISH_WITHIN)


def report_of(report: Report, epoch: int, capacity: int, room: int) -> Report:
    """The report of the way back from ``report``.

    Args:
        report: of the way there.
        epoch: of the way back.
        capacity: as it is.
        room: to which it is raised when the lease ends without a way back.
    """
    return Report(
        epoch,
        report.new,
        report.old,
        tuple(report.new.moves_to(report.old)),
        capacity_before=max(room, capacity),
        capacity_during=capacity,
        capacity_after=capacity,
        path=(report.old,),
    )


def refuse(job: Job) -> None:
    """There is nothing to go back from: the way there was given up."""
    job.fail(CancelledError("there is no lease: the move was given up, or took several waves"))
    if job.phase is Phase.PLANNED:
        job.enter(Phase.ABORTED)
    job.end()

"""How a reconfiguration ends: completed after the decision, or taken back before it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TypeVar

from pipelive_kv.coordinator.fanout import SCHEDULER_NAME, Fanout, name_of
from pipelive_kv.coordinator.job import Job
from pipelive_kv.coordinator.report import Report
from pipelive_kv.errors import ClosedError, DeadlineError, PipeliveError
from pipelive_kv.messages import (
    Abort,
    AwaitSwitched,
    Commit,
    DescribeScheduler,
    Done,
    Grow,
    RaiseCapacity,
    Release,
    SchedulerInfo,
    Settle,
    Switched,
)
from pipelive_kv.protocol import Phase
from pipelive_kv.record import Decision, DecisionRecord

_log = logging.getLogger(__name__)
_A = TypeVar("_A")

ABORT_TIMEOUT = 10.0
"""Seconds for each participant to take an abort back; the job's own deadline may have passed."""

_GROW_TIMEOUT = 60.0
"""Seconds for every stage to map the blocks that fit again."""

_INSIST_EVERY = 5.0
"""Seconds after which a request is made again that has to succeed, since the decision is made."""

_RETURN_WITHIN = 5.0
"""Seconds in which a participant whose connection ended after the decision can come back."""

_NOTICE_WITHIN = 1.0
"""Seconds to find out who has gone, where an error of another one hints at it."""


class Ending:
    """What is left to do for one epoch, whoever began it: its coordinator or the next one."""

    _decides = False
    """Whether this is what records a commit, so that without it there is none."""

    def __init__(
        self,
        fanout: Fanout,
        record: DecisionRecord,
        job: Job,
        report: Report,
        *,
        resize: int = 0,
        capacity_after: int = -1,
    ) -> None:
        self._to = fanout
        self._record = record
        self._job = job
        self._report = report
        self._resize = resize
        self._after = capacity_after
        self._keeps = False
        self.epoch = report.epoch

    @property
    def capacity_after(self) -> int:
        """What the capacity is raised to; with a lease, at its end."""
        return max(self._after, self._report.capacity_during)

    # after the decision: it always completes, unless a participant is lost for good

    def complete(self) -> None:
        """What follows the decision; the job is done when this returns, whatever it found."""
        try:
            with self._to.checking(self._job.check_left):
                self._complete()
        except Exception as error:
            # Decided is decided: the new placement serves, but its clean-up is not finished.
            _log.error("epoch %d is committed but could not be completed: %s", self.epoch, error)
            self._job.fail(self.explained(error))
            self._job.enter(Phase.DONE, lost=True)

    def _complete(self) -> None:
        to, job, report = self._to, self._job, self._report
        job.enter(Phase.SWITCHING)
        self._insist(lambda: to.scheduler(Settle(self.epoch, commit=True), Done, _INSIST_EVERY))
        self._insist(lambda: to.all(lambda _: Commit(self.epoch, report.step), Done, _INSIST_EVERY))
        report.stages = self._insist(
            lambda: to.all(
                lambda _: AwaitSwitched(self.epoch, _INSIST_EVERY - 1), Switched, _INSIST_EVERY
            )
        )
        job.enter(Phase.RELEASING)
        scheduler = self._insist(
            lambda: to.scheduler(DescribeScheduler(), SchedulerInfo, _INSIST_EVERY)
        )
        report.decision_wait_s = scheduler.switch_hold_s
        self._insist(
            lambda: to.all(
                lambda _: Release(self.epoch, _INSIST_EVERY - 1, keep=self._keeps),
                Done,
                _INSIST_EVERY,
            )
        )
        capacity = report.capacity_during if self._keeps else self.capacity_after
        if capacity > report.capacity_during:
            to.all(lambda _: Grow(capacity, self._resize, _GROW_TIMEOUT), Done, _GROW_TIMEOUT)
            to.scheduler(RaiseCapacity(capacity), Done, _GROW_TIMEOUT)
        report.capacity_after = capacity
        job.enter(Phase.DONE)

    def _insist(self, ask: Callable[[], _A]) -> _A:
        """Ask until all have answered: the engine may be idle, and the decision stands."""
        while True:
            try:
                return ask()
            except DeadlineError as error:
                _log.info("epoch %d waits for its switchover: %s", self.epoch, error)
            except ClosedError as error:
                self._job.check_left()
                missing = self._to.missing()
                if not missing:
                    raise
                _log.warning("epoch %d: %s; waiting for its return", self.epoch, error)
                try:
                    self._to.server.await_participants(missing, _RETURN_WITHIN)
                except DeadlineError:
                    raise error from None

    # before the decision: the old placement serves, as before

    def abort(self, error: PipeliveError) -> None:
        """Take back what was done, unless the record says that it is committed."""
        job = self._job
        if not self._report.dry_run:
            job.fail(self.explained(error))
        job.enter(Phase.ABORTING)
        decision = self._decided(Decision(self.epoch, "abort", reason=str(error)))
        job.course.recorded = decision.outcome
        if decision.outcome == "commit":
            self._report.step = decision.step
            self._after = decision.capacity
            job.absolve()
            self.complete()
            return
        self._take_back(str(error))
        job.enter(Phase.ABORTED)

    def _decided(self, abort: Decision) -> Decision:
        """What is recorded; ``abort`` if nothing is and nothing can be.

        Only the coordinator that runs the epoch records a commit. Where it finds none, there is
        none, and it may tell everybody without a record. A later coordinator has to have one: the
        earlier one may still be about to commit.
        """
        try:
            return self._record.decide(abort)
        except Exception as error:
            if not self._decides:
                raise
            found = self._record.read(abort.epoch)
            _log.error("the abort of epoch %d could not be recorded: %s", abort.epoch, error)
            return found or abort

    def _take_back(self, reason: str) -> None:
        """Every step is tried, whatever the others did."""
        to, report = self._to, self._report
        problems = to.try_all(
            lambda _: Abort(self.epoch, reason, ABORT_TIMEOUT), Done, ABORT_TIMEOUT
        )
        problems |= to.try_scheduler(Settle(self.epoch, commit=False), Done, ABORT_TIMEOUT)
        # Whoever has gone without holding a layer is not missed.
        living = [rank for rank in to.ranks if name_of(rank) not in problems]
        serving = {name_of(rank) for rank, held in enumerate(report.old.stages) if held}
        missed = [
            name
            for name in problems
            if name not in to.stages or to.server.is_connected(name) or name in serving
        ]
        if not missed:
            problems |= self._grow_back(living)
        for name, problem in problems.items():
            _log.error("while epoch %d was taken back: %s: %s", self.epoch, name, problem)

    def _grow_back(self, ranks: Sequence[int]) -> dict[str, PipeliveError]:
        """Raise the capacity to what it was, also where not all of a shrink's steps have come."""
        to, capacity = self._to, self._report.capacity_before
        try:
            found = to.scheduler(DescribeScheduler(), SchedulerInfo, ABORT_TIMEOUT)
        except PipeliveError as error:
            return {SCHEDULER_NAME: error}
        if found.capacity >= capacity:
            return {}
        return to.try_all(
            lambda _: Grow(capacity, found.resize, ABORT_TIMEOUT), Done, ABORT_TIMEOUT, ranks
        ) or to.try_scheduler(RaiseCapacity(capacity), Done, ABORT_TIMEOUT)

    # what went wrong, in which phase, and who has gone

    def explained(self, error: Exception) -> PipeliveError:
        """``error`` with the phase, and the names of those who have gone."""
        if not isinstance(error, PipeliveError):
            error = PipeliveError(f"{type(error).__name__}: {error}")
        text = str(error)
        phase = f"phase {self._job.phase.value}"
        if phase not in text:
            text = f"in {phase}: {text}"
        if isinstance(error, ClosedError):
            self._to.server.await_loss(self._to.stages, _NOTICE_WITHIN)
            unnamed = [name for name in self._to.missing() if name not in text]
            if unnamed:
                text += f"; {', '.join(unnamed)} gone"
        return type(error)(text)

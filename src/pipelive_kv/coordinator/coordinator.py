"""Carries a reconfiguration through its phases, and takes it back where it cannot be made."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable
from typing import TypeVar

from pipelive_kv.control import ControlEndpoint, ControlServer
from pipelive_kv.coordinator.fanout import Fanout
from pipelive_kv.coordinator.job import Job
from pipelive_kv.coordinator.options import MigrationOptions
from pipelive_kv.coordinator.report import Phase, Report
from pipelive_kv.errors import (
    BusyError,
    ClosedError,
    DeadlineError,
    InvalidArgumentError,
    OverBudgetError,
    PipeliveError,
    ProtocolError,
)
from pipelive_kv.messages import (
    Abort,
    Admit,
    Admitted,
    Arm,
    AwaitConverged,
    AwaitResize,
    AwaitStep,
    AwaitSwitched,
    Commit,
    Connect,
    Converged,
    Describe,
    DescribeScheduler,
    Done,
    Grow,
    Held,
    Hold,
    ListLive,
    LiveBlocks,
    LoadWeights,
    Observe,
    Prepare,
    Prepared,
    Progress,
    Propose,
    Proposed,
    RaiseCapacity,
    Release,
    Request,
    Resized,
    SchedulerInfo,
    Settle,
    Shrink,
    StageInfo,
    StartCopy,
    Switched,
)
from pipelive_kv.placement import Placement, whole_stacks
from pipelive_kv.record import Decision, FileDecisionRecord

_log = logging.getLogger(__name__)
_A = TypeVar("_A")

_ABORT_TIMEOUT = 10.0
"""Seconds for each participant to take an abort back; the job's own deadline may have passed."""

_GROW_TIMEOUT = 60.0
"""Seconds for every stage to map the blocks that fit again."""

_INSIST_EVERY = 5.0
"""Seconds after which a request is made again that has to succeed, since the decision is made."""


class Coordinator:
    """Listens for the scheduler and the stages, and reconfigures on request, one at a time.

    Args:
        control: where to listen; see :attr:`endpoint` for the port that ``tcp://host:*`` became.
        pp_size: the number of stages.
        record_dir: where decisions are recorded; the scheduler must see the same directory.
    """

    def __init__(
        self, control: ControlEndpoint, *, pp_size: int, record_dir: str | os.PathLike[str]
    ) -> None:
        if pp_size < 1:
            raise InvalidArgumentError(f"pp_size is {pp_size}, expected 1 or more")
        self._record = FileDecisionRecord(record_dir)
        self._server = ControlServer(control)
        self._stages = tuple(f"stage/{rank}" for rank in range(pp_size))
        self._fanout = Fanout(self._server, self._stages)
        self._lock = threading.Lock()
        self._job: Job | None = None
        self._thread: threading.Thread | None = None
        self._closed = False

    @property
    def endpoint(self) -> ControlEndpoint:
        """Where the scheduler and the stages connect."""
        return self._server.endpoint

    def await_ready(self, timeout: float) -> None:
        """Wait until the scheduler and every stage have announced themselves.

        Raises:
            DeadlineError: naming who has not.
        """
        self._server.await_participants(["scheduler", *self._stages], timeout)

    def observe(self, timeout: float = 5.0) -> tuple[Progress, ...]:
        """How every stage stands at this moment."""
        return self._fanout.all(lambda _: Observe(), Progress, timeout)

    def reconfigure(
        self,
        placement: Placement,
        *,
        timeout: float = 60.0,
        options: MigrationOptions | None = None,
        on_phase: Callable[[Phase], None] | None = None,
    ) -> Job:
        """Start to take the pipeline to ``placement``; returns at once.

        A placement equal to the current one makes a switchover that changes nothing, which is what
        the stop time of others is compared with.

        Args:
            placement: of the same number of layers and stages.
            timeout: seconds for the whole reconfiguration.
            options: how it is carried out.
            on_phase: called with each phase, in the job's thread.

        Raises:
            BusyError: another reconfiguration is under way.
            ClosedError: the coordinator was closed.
        """
        if not isinstance(placement, Placement):
            raise InvalidArgumentError(
                f"placement is a {type(placement).__name__}, expected a Placement"
            )
        if not timeout > 0:
            raise InvalidArgumentError(f"timeout is {timeout}, expected seconds above 0")
        with self._lock:
            if self._closed:
                raise ClosedError("Coordinator.reconfigure: the coordinator is closed")
            if self._job is not None and not self._job.phase.is_final:
                raise BusyError(
                    f"another reconfiguration is in phase {self._job.phase.value}; wait for it, or "
                    "cancel it"
                )
            job = Job(timeout, on_phase)
            self._job = job
            self._thread = threading.Thread(
                target=self._run,
                args=(job, placement, options or MigrationOptions()),
                name="pipelive-reconfigure",
                daemon=True,
            )
            self._thread.start()
            return job

    def close(self) -> None:
        """Cancel what is not decided yet, wait for it, and leave the control plane."""
        with self._lock:
            self._closed = True
            job, thread = self._job, self._thread
        if job is not None:
            job.cancel()
        if thread is not None:
            thread.join(timeout=2 * _ABORT_TIMEOUT)
        self._server.close()

    # -- the job's thread --------------------------------------------------------------------------

    def _run(self, job: Job, target: Placement, options: MigrationOptions) -> None:
        run = _Reconfiguration(self._fanout, self._record, job, target, options)
        try:
            run.plan()
        except PipeliveError as error:
            job.fail(error)
            job.enter(Phase.ABORTED)
            return
        except Exception as error:
            _log.exception("a reconfiguration could not be planned")
            job.fail(PipeliveError(f"{type(error).__name__}: {error}"))
            job.enter(Phase.ABORTED)
            return
        try:
            run.until_decided()
        except Exception as error:
            if not isinstance(error, PipeliveError):
                _log.exception("a reconfiguration failed")
                error = PipeliveError(f"{type(error).__name__}: {error}")
            run.abort(error)
            return
        try:
            run.complete()
        except Exception as error:
            # Decided is decided: the new placement serves, but its clean-up is not finished.
            _log.exception("epoch %d is committed but could not be completed", run.epoch)
            job.fail(
                error
                if isinstance(error, PipeliveError)
                else PipeliveError(f"{type(error).__name__}: {error}")
            )
            job.enter(Phase.DONE)


class _Reconfiguration:
    """The phases of one reconfiguration, in order; see docs/design.md, section 5."""

    def __init__(
        self,
        fanout: Fanout,
        record: FileDecisionRecord,
        job: Job,
        target: Placement,
        options: MigrationOptions,
    ) -> None:
        self._to = fanout
        self._record = record
        self._job = job
        self._target = target
        self._options = options
        self._resize = 0
        self.epoch = -1

    # planned: who is there, what is there, is the wish a possible one

    def plan(self) -> None:
        """Find out what is there; nothing is changed."""
        to, job = self._to, self._job
        to.server.await_participants(["scheduler", *to.stages], min(10.0, job.rest()))
        self._infos = to.all(lambda _: Describe(), StageInfo, job.rest())
        scheduler = to.scheduler(DescribeScheduler(), SchedulerInfo, job.rest())
        current = Placement(scheduler.stages)
        for rank, info in enumerate(self._infos):
            if info.layers != current.layers_of(rank) or info.epoch != scheduler.epoch:
                raise ProtocolError(
                    f"stage {rank} holds layers {info.layers} in epoch {info.epoch}, the scheduler "
                    f"expects {current.layers_of(rank)} in epoch {scheduler.epoch}"
                )
            whole_stacks([self._target], info.stack)
        moves = tuple(current.moves_to(self._target))
        self.epoch = 1 + max(scheduler.newest_epoch, scheduler.epoch, self._record.newest_epoch())
        self._stages = self._target.stages
        self._report = Report(
            self.epoch,
            current,
            self._target,
            moves,
            capacity_before=scheduler.capacity,
            capacity_during=scheduler.capacity,
            capacity_after=scheduler.capacity,
        )
        job.begin(self._report)
        self._after = scheduler.capacity

    def until_decided(self) -> None:
        """All phases that can still be taken back, and the decision."""
        with self._to.checking(self._job.rest):
            self._prepare_switchover()

    def _prepare_switchover(self) -> None:
        self._admit()
        self._stage()
        self._patch()
        self._arm()
        self._decide()

    # admitted: the budget rule, and the shrink that makes room

    def _admit(self) -> None:
        to, job, report = self._to, self._job, self._report
        job.enter(Phase.ADMITTED)
        if not report.moves:
            return
        admitted = to.all(lambda _: Admit(self.epoch, self._stages), Admitted, job.rest())
        lacking = [answer.reason for answer in admitted if answer.reason]
        if lacking:
            raise OverBudgetError("; ".join(lacking))
        during = min(report.capacity_before, *(answer.during for answer in admitted))
        self._after = min(answer.after for answer in admitted)
        if self._options.keep_capacity:
            self._after = min(self._after, report.capacity_before)
        if during < report.capacity_before:
            resized = to.scheduler(Shrink(during, job.rest()), Resized, job.rest())
            report.capacity_during, report.blocks_moved = resized.capacity, resized.moved
            self._resize = resized.resize
            to.all(lambda _: AwaitResize(resized.resize, job.rest()), Done, job.rest())

    # staging: room, connections, the bulk of the KV and the weights

    def _stage(self) -> None:
        to, job, options = self._to, self._job, self._options
        job.enter(Phase.STAGING)
        moves = self._report.moves
        prepared = to.all(
            lambda rank: Prepare(
                self.epoch,
                self._stages,
                tuple((move.source, move.layers) for move in moves if move.target == rank),
                options.weights_from,
                options.verify,
                job.rest(),
            ),
            Prepared,
            job.rest(),
        )
        outgoing: dict[int, list[tuple[int, tuple[int, ...], str]]] = {}
        for rank, answer in enumerate(prepared):
            incoming = [move for move in moves if move.target == rank]
            for move, address in zip(incoming, answer.addresses, strict=True):
                outgoing.setdefault(move.source, []).append((rank, move.layers, address))
        if options.mode == "stop_and_copy":
            # The weights are loaded before the engine is held: what is compared is the KV.
            if options.weights_from == "source":
                self._load_weights()
            held = to.scheduler(Hold(self.epoch, job.rest()), Held, job.rest())
            to.all(lambda _: AwaitStep(held.last_seq, job.rest()), Done, job.rest())
        to.all(
            lambda rank: Connect(
                self.epoch,
                self._stages,
                tuple(outgoing.get(rank, ())),
                options.weights_from,
                options.verify,
                options.rate_limit,
                job.rest(),
            ),
            Done,
            job.rest(),
        )
        # After every source has started its log: what is written from now on is in a log, what was
        # written before is in a block that is live now.
        live = to.scheduler(ListLive(), LiveBlocks, job.rest())
        to.all(
            lambda _: StartCopy(
                self.epoch, live.runs, options.max_stop_ms, options.max_rounds, job.rest()
            ),
            Done,
            job.rest(),
        )
        if not (options.mode == "stop_and_copy" and options.weights_from == "source"):
            self._load_weights()

    def _load_weights(self) -> None:
        job = self._job
        self._to.all(lambda _: LoadWeights(self.epoch, job.rest()), Done, job.rest())

    # patching: rounds until the predicted stop time is small

    def _patch(self) -> None:
        job = self._job
        job.enter(Phase.PATCHING)
        self._to.all(lambda _: AwaitConverged(self.epoch, job.rest()), Converged, job.rest())

    # armed: every stage has voted

    def _arm(self) -> None:
        job = self._job
        job.enter(Phase.ARMED)
        self._to.all(lambda _: Arm(self.epoch, job.rest()), Done, job.rest())

    def _decide(self) -> None:
        to, job, options = self._to, self._job, self._options
        proposed = to.scheduler(
            Propose(
                self.epoch,
                self._stages,
                str(self._record.directory.absolute()),
                options.margin,
                job.rest(),
            ),
            Proposed,
            job.rest(),
        )
        job.rest()
        decision = self._record.decide(
            Decision(self.epoch, "commit", step=proposed.step, stages=self._stages)
        )
        if decision.outcome != "commit":
            raise ProtocolError(f"epoch {self.epoch} was given up: {decision.reason}")
        self._report.step = decision.step

    # switching and releasing: from here on it always completes

    def complete(self) -> None:
        """What follows the decision."""
        to, job, report = self._to, self._job, self._report
        job.enter(Phase.SWITCHING)
        to.scheduler(Settle(self.epoch, commit=True), Done, _INSIST_EVERY)
        to.all(lambda _: Commit(self.epoch, report.step), Done, _INSIST_EVERY)
        report.stages = self._insist(
            lambda _: AwaitSwitched(self.epoch, _INSIST_EVERY - 1), Switched
        )
        job.enter(Phase.RELEASING)
        self._insist(lambda _: Release(self.epoch, _INSIST_EVERY - 1), Done)
        self._grow(max(self._after, report.capacity_during))
        job.enter(Phase.DONE)

    def _insist(self, request: Callable[[int], Request], kind: type[_A]) -> tuple[_A, ...]:
        """Ask until all have answered: the engine may be idle, and the decision stands."""
        while True:
            try:
                return self._to.all(request, kind, _INSIST_EVERY)
            except DeadlineError as error:
                _log.info("epoch %d waits for its switchover: %s", self.epoch, error)

    def _grow(self, capacity: int) -> None:
        if capacity > self._report.capacity_during:
            self._to.all(lambda _: Grow(capacity, self._resize, _GROW_TIMEOUT), Done, _GROW_TIMEOUT)
            self._to.scheduler(RaiseCapacity(capacity), Done, _GROW_TIMEOUT)
        self._report.capacity_after = capacity

    # aborting: the old placement serves, as before

    def abort(self, error: PipeliveError) -> None:
        """Take back what was done; every step is tried, whatever the others did."""
        to, job, report = self._to, self._job, self._report
        job.fail(error)
        job.enter(Phase.ABORTING)
        decision = self._record.decide(Decision(self.epoch, "abort", reason=str(error)))
        if decision.outcome == "commit":
            self._report.step = decision.step
            self._finish_after_all()
            return
        problems = to.try_all(lambda _: Abort(self.epoch, str(error)), Done, _ABORT_TIMEOUT)
        problems += to.try_scheduler(Settle(self.epoch, commit=False), Done, _ABORT_TIMEOUT)
        if report.capacity_during < report.capacity_before and not problems:
            capacity = report.capacity_before
            problems += to.try_all(
                lambda _: Grow(capacity, self._resize, _ABORT_TIMEOUT), Done, _ABORT_TIMEOUT
            )
            if not problems:
                problems += to.try_scheduler(RaiseCapacity(capacity), Done, _ABORT_TIMEOUT)
        for problem in problems:
            _log.error("while epoch %d was taken back: %s", self.epoch, problem)
        job.enter(Phase.ABORTED)

    def _finish_after_all(self) -> None:
        """The commit was recorded although an error hid it: what is recorded holds."""
        try:
            self.complete()
        except PipeliveError as error:
            self._job.fail(error)
            self._job.enter(Phase.DONE)

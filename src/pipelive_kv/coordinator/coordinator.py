"""Carries reconfigurations through their phases, one at a time, and ends what others have left."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from pipelive_kv.control import ControlEndpoint, ControlServer
from pipelive_kv.coordinator.agreement import check_agreement, check_joined
from pipelive_kv.coordinator.ending import ABORT_TIMEOUT
from pipelive_kv.coordinator.fanout import SCHEDULER_NAME, Fanout, name_of
from pipelive_kv.coordinator.job import Job
from pipelive_kv.coordinator.lease import Lease, refuse, report_of
from pipelive_kv.coordinator.options import MigrationOptions
from pipelive_kv.coordinator.reconfiguration import DryRunEnd, Reconfiguration
from pipelive_kv.coordinator.recovery import Recovery, Survey, survey
from pipelive_kv.coordinator.route import Route
from pipelive_kv.errors import (
    BusyError,
    ClosedError,
    DeadlineError,
    InvalidArgumentError,
    PipeliveError,
)
from pipelive_kv.messages import Observe, Progress
from pipelive_kv.placement import Placement
from pipelive_kv.protocol import Phase
from pipelive_kv.record import Decision, DecisionRecord, FileDecisionRecord

_log = logging.getLogger(__name__)

_LEND_WITHIN = 60.0
"""Seconds to prepare the way back, once the way there is done."""

_FINISH_WITHIN = 2.0
"""Seconds that closing leaves a decided reconfiguration to complete while steps go on."""

_GOES_WITHIN = 5.0
"""Seconds that a stage which leaves has to end its connection."""

_LOOK_EVERY = 0.01
"""Seconds between two questions to a stage that joins."""


class Coordinator:
    """Listens for the scheduler and the stages, and reconfigures on request, one at a time.

    Args:
        control: where to listen; see :attr:`endpoint` for the port that ``tcp://host:*`` became.
        pp_size: the number of stages at the start; see :meth:`add_stage` for more.
        record_dir: where decisions are recorded; the scheduler must see the same directory.
        record: where they are recorded instead; the scheduler is given one that reads the same.
        ranks: of the stages that there are, for a coordinator that takes the place of one under
            which some have joined or left; None: 0 to ``pp_size - 1``.
    """

    def __init__(
        self,
        control: ControlEndpoint,
        *,
        pp_size: int,
        record_dir: str | os.PathLike[str] | None = None,
        record: DecisionRecord | None = None,
        ranks: Iterable[int] | None = None,
    ) -> None:
        if pp_size < 1:
            raise InvalidArgumentError(f"pp_size is {pp_size}, expected 1 or more")
        self._ranks = tuple(range(pp_size)) if ranks is None else tuple(sorted(set(ranks)))
        if not self._ranks or self._ranks[0] < 0:
            raise InvalidArgumentError(f"ranks is {self._ranks}, expected some of 0 or more")
        if (record_dir is None) == (record is None):
            raise InvalidArgumentError(
                f"record_dir is {record_dir} and record is {record}, expected one of them"
            )
        self._record_dir = "" if record_dir is None else str(Path(record_dir).absolute())
        self._record = record or FileDecisionRecord(self._record_dir)
        self._server = ControlServer(control)
        self._lock = threading.Lock()
        self._job: Job | None = None
        self._thread: threading.Thread | None = None
        self._changing = ""
        self._room = -1
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
        names = [name_of(rank) for rank in self._ranks]
        self._server.await_participants([SCHEDULER_NAME, *names], timeout)

    def observe(self, timeout: float = 5.0) -> tuple[Progress, ...]:
        """How every stage stands at this moment."""
        return Fanout(self._server, self._ranks).all(lambda _: Observe(), Progress, timeout)

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
            placement: of the same number of layers, on stages that are there.
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
            lease = self._lease_to(placement)
            if lease is not None:
                lease.proceed()
                return lease
            self._check_free()
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

    def recover(self, timeout: float = 60.0) -> tuple[Decision, ...]:
        """End what an earlier coordinator has left, as the record says.

        For a coordinator that takes the place of one that died: it listens at the same address and
        has the same record. An epoch that is on record as committed is completed (which takes steps
        of the engine), every other one is given up. The old coordinator's word is refused from then
        on, also where it has only been stopped. A reconfiguration that finds something left behind
        does this first, by itself.

        Args:
            timeout: seconds to hear from everybody and to end what was left.

        Returns:
            What holds, for every epoch for which something was left.

        Raises:
            BusyError: this coordinator has a reconfiguration under way.
            DeadlineError: somebody did not answer; named.
            ClosedError: a participant was lost, or the coordinator was closed.
        """
        with self._lock:
            if self._closed:
                raise ClosedError("Coordinator.recover: the coordinator is closed")
            self._check_free()
        return Recovery(self._server, self._ranks, self._record, timeout).run(fence=True)

    def close(self) -> None:
        """Cancel what is not decided yet, wait for it, and leave the control plane.

        What is decided is left a moment to complete; where no step comes, a coordinator to come
        completes it.
        """
        with self._lock:
            self._closed = True
            job, thread = self._job, self._thread
        if job is not None and thread is not None:
            for one in filter(None, (job, job.lease)):
                one.cancel()
            thread.join(timeout=_FINISH_WITHIN)
            for one in filter(None, (job, job.lease)):
                one.leave()
            thread.join(timeout=2 * ABORT_TIMEOUT)
        self._server.close()

    @property
    def stages(self) -> tuple[int, ...]:
        """The ranks of the stages that there are, ascending."""
        return self._ranks

    def add_stage(self, rank: int, attach: Callable[[], object], *, timeout: float = 60.0) -> None:
        """Take stage ``rank`` into the running pipeline; it holds no layer at first.

        Placements may give it layers from then on. Until this returns, nobody waits for it or
        depends on it: where it fails, or dies, everything is as it was.

        Args:
            rank: one that is not there: behind all others, or of a stage that has left.
            attach: called in this thread while no reconfiguration is under way and none can
                begin. It starts the process, whose Stage is made with ``joins=True``, and makes the
                engine send it all steps from some step on, one of which must come soon.
            timeout: seconds for the stage to announce itself and to begin its first step.

        Raises:
            BusyError: a reconfiguration, or another change, is under way.
            DeadlineError: the stage did not announce itself, or began no step.
            ProtocolError: what it says of itself does not fit to the others.
        """
        if rank in self._ranks or rank < 0:
            raise InvalidArgumentError(
                f"rank is {rank}, expected one that is not there; there are {self._ranks}"
            )
        ends_at = time.monotonic() + timeout
        with self._alone(f"stage {rank} joins"):
            attach()
            ranks = tuple(sorted((*self._ranks, rank)))
            self._server.await_participants([name_of(rank)], _left(ends_at))
            while not check_joined(survey(Fanout(self._server, ranks), _left(ends_at)), rank):
                if time.monotonic() >= ends_at:
                    raise DeadlineError(
                        f"stage {rank} began no step within {timeout:g} s after it had joined"
                    )
                time.sleep(_LOOK_EVERY)
            self._ranks = ranks

    def remove_stage(
        self, rank: int, detach: Callable[[], object], *, timeout: float = 60.0
    ) -> None:
        """Let stage ``rank``, which holds no layer any more, go.

        Args:
            rank: of the stage.
            detach: called in this thread while no reconfiguration is under way and none can begin.
                It makes the engine send no further step to the stage; its process may end then.
            timeout: seconds for everybody to say how they stand.

        Raises:
            BusyError: a reconfiguration, or another change, is under way; or it holds layers.
        """
        if rank not in self._ranks or len(self._ranks) == 1:
            raise InvalidArgumentError(f"rank is {rank}, expected one of several: {self._ranks}")
        with self._alone(f"stage {rank} leaves"):
            others = tuple(other for other in self._ranks if other != rank)
            # Not the stage itself: it may have died, having no layers.
            found = survey(Fanout(self._server, others), timeout)
            placement = Placement(found.scheduler.stages)
            held = placement.layers_of(rank) if rank < placement.num_stages else ()
            if held:
                raise BusyError(f"stage {rank} cannot leave: it holds layers {held}")
            detach()
            self._ranks = others
            # One that comes under the same name later must not be taken for this one.
            self._server.await_loss([name_of(rank)], min(timeout, _GOES_WITHIN))

    @contextmanager
    def _alone(self, what: str) -> Iterator[None]:
        """No reconfiguration is under way, and none begins."""
        with self._lock:
            if self._closed:
                raise ClosedError(f"{what}: the coordinator is closed")
            self._check_free()
            self._changing = what
        try:
            yield
        finally:
            with self._lock:
                self._changing = ""

    def _check_free(self) -> None:
        if self._changing:
            raise BusyError(f"{self._changing}; wait for it")
        lease = self._job.lease if self._job is not None else None
        if lease is not None and self._job is not None and self._job.is_over and not lease.is_over:
            raise BusyError(
                "the placement before can still be taken up again; let the lease go with "
                "Job.lease.cancel(), and wait for its end"
            )
        if self._job is not None and not self._job.is_over:
            raise BusyError(
                f"another reconfiguration is in phase {self._job.phase.value}; wait for it, or "
                "cancel it"
            )

    # -- the job's thread --------------------------------------------------------------------------

    def _run(self, job: Job, target: Placement, options: MigrationOptions) -> None:
        try:
            self._carry_out(job, target, options)
        except Exception as error:
            # For instance a record that cannot be written: nobody may guess what was decided.
            _log.exception("a reconfiguration ended in phase %s", job.phase.value)
            job.fail(_as_ours(error))
        finally:
            job.end()
            if job.lease is not None:
                self._lend(job, job.lease, options)

    def _lease_to(self, placement: Placement) -> Job | None:
        """The way back to ``placement``, where there is one."""
        job = self._job
        if job is None or job.lease is None or not job.is_over or job.lease.is_over:
            return None
        old = job.report.old
        wanted = placement.padded(max(old.num_stages, placement.num_stages))
        return job.lease if wanted == old.padded(wanted.num_stages) else None

    def _lend(self, job: Job, lease: Job, options: MigrationOptions) -> None:
        try:
            if job.phase is not Phase.DONE or self._room < 0:
                refuse(lease)
                return
            to = Fanout(self._server, self._ranks, lease.course)
            with to.checking(lease.rest):
                found = survey(to, lease.rest())
            epoch = 1 + max(found.newest_epoch, self._record.newest_epoch())
            report = report_of(job.report, epoch, found.scheduler.capacity, self._room)
            lease.begin(report)
            ends_at = job.report.step + options.lease_steps
            Lease(to, self._record, self._record_dir, lease, report, options, ends_at).carry_out()
        except Exception as error:
            _log.exception("a lease ended in phase %s", lease.phase.value)
            lease.fail(_as_ours(error))
        finally:
            lease.end()

    def _carry_out(self, job: Job, target: Placement, options: MigrationOptions) -> None:
        try:
            route = self._plan(job, target, options)
        except Exception as error:
            if not isinstance(error, PipeliveError):
                _log.exception("a reconfiguration could not be planned")
            job.fail(_as_ours(error))
            job.enter(Phase.ABORTED)
            return
        self._room = -1
        if options.lease_steps and len(route.path) == 1 and job.report.moves:
            job.lease = Job(_LEND_WITHIN)
        for number in range(len(route.path)):
            self._carry_out_wave(job, route, number, options)
            if job.is_over:
                return

    def _carry_out_wave(
        self, job: Job, route: Route, number: int, options: MigrationOptions
    ) -> None:
        try:
            report = route.begin(job, number, self._survey_between(job) if number else None)
        except Exception as error:
            job.fail(route.explained(job, number, _as_ours(error)))
            job.enter(Phase.ABORTED)
            return
        to = Fanout(self._server, self._ranks, job.course)
        wave = route.wave(number)
        run = Reconfiguration(to, self._record, self._record_dir, job, report, options, wave)
        try:
            run.until_decided()
        except DryRunEnd as end:
            job.report.dry_run = report.dry_run = True
            run.abort(end)
        except Exception as error:
            if not isinstance(error, PipeliveError):
                _log.exception("a reconfiguration failed")
            run.abort(route.explained(job, number, _as_ours(error)))
        else:
            run.complete()
            self._room = run.capacity_after
        route.end(run.room)

    def _plan(self, job: Job, target: Placement, options: MigrationOptions) -> Route:
        """Find out who and what is there, and whether the wish is a possible one."""
        to = Fanout(self._server, self._ranks, job.course)
        with to.checking(job.rest):
            found = survey(to, job.rest())
            recovery = Recovery(self._server, self._ranks, self._record, job.rest())
            if recovery.left(found):
                recovery.run(fence=False)
                found = survey(to, job.rest())
        target = check_agreement(found, target)
        epoch = 1 + max(found.newest_epoch, self._record.newest_epoch())
        return Route(job, found, target, epoch, in_waves=options.waves == "auto")

    def _survey_between(self, job: Job) -> Survey:
        """Between two waves; a cancel is obeyed where there is something to take back."""
        return survey(Fanout(self._server, self._ranks, job.course), ABORT_TIMEOUT)


def _left(ends_at: float) -> float:
    return max(0.1, ends_at - time.monotonic())


def _as_ours(error: Exception) -> PipeliveError:
    if isinstance(error, PipeliveError):
        return error
    return PipeliveError(f"{type(error).__name__}: {error}")

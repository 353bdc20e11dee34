"""One reconfiguration under way."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from pipelive_kv.coordinator.report import PhaseSpan, Report
from pipelive_kv.errors import CancelledError, ClosedError, DeadlineError, PipeliveError
from pipelive_kv.protocol import Course, Phase


class Job:
    """A handle on a reconfiguration that runs in a thread of the coordinator."""

    def __init__(
        self,
        timeout: float,
        on_phase: Callable[[Phase], None] | None = None,
        *,
        start: Phase = Phase.PLANNED,
    ) -> None:
        self._lock = threading.Condition()
        self.course = Course(start)
        self._left = False
        self._over = False
        self._since_ns = time.monotonic_ns()
        self._ends_at = time.monotonic() + timeout
        self._on_phase = on_phase
        self._cancelled = False
        self._proceed = False
        self.lease: Job | None = None
        """With ``lease_steps``: the way back. It is armed soon after this job is done, and given up
        when its steps have gone by, or by its cancel."""
        self._error: PipeliveError | None = None
        self._report: Report | None = None
        self._wave: Report | None = None
        self._more = False

    @property
    def phase(self) -> Phase:
        """The phase it is in."""
        return self.course.phase

    @property
    def is_over(self) -> bool:
        """Whether nothing more happens."""
        return self.phase.is_final or self._over

    @property
    def report(self) -> Report:
        """What is known so far; complete once the job is done.

        Raises:
            PipeliveError: the reconfiguration failed before anything was known about it.
        """
        with self._lock:
            if self._report is None:
                raise self._error or CancelledError("the job has not started")
            return self._report

    def cancel(self) -> None:
        """Give up, unless it is decided already. Returns at once; may be called twice."""
        with self._lock:
            self._cancelled = True
            self._lock.notify_all()

    def proceed(self) -> None:
        """Let one that was begun with ``pause`` be decided, now or as soon as it is armed."""
        with self._lock:
            self._proceed = True
            self._lock.notify_all()

    def wait(self, timeout: float | None = None) -> Report:
        """Wait for the end.

        Raises:
            DeadlineError: it did not end within ``timeout`` seconds; it goes on.
            PipeliveError: why it was refused or given up; the old placement serves.
        """
        end = None if timeout is None else time.monotonic() + timeout
        with self._lock:
            while not self.is_over:
                rest = None if end is None else end - time.monotonic()
                if rest is not None and rest <= 0:
                    raise DeadlineError(
                        f"the reconfiguration did not end within {timeout:g} s; it is in phase "
                        f"{self.phase.value}"
                    )
                self._lock.wait(rest)
            if self._error is not None:
                raise self._error
            if self._report is None:
                raise CancelledError("the job has no report")
            return self._report

    def await_proceed(self, timeout: float | None = None) -> bool:
        """Wait for :meth:`proceed`; raises as :meth:`rest` does.

        Returns whether it came; with a ``timeout`` in seconds it may not have.
        """
        with self._lock:
            if timeout is None:
                while not self._proceed:
                    self._lock.wait(self.rest())
            elif not self._proceed:
                self._lock.wait(min(timeout, self.rest()))
            return self._proceed

    def extend(self, seconds: float) -> None:
        """The deadline is that far away, counted from now."""
        with self._lock:
            self._ends_at = time.monotonic() + seconds

    # -- for the coordinator -----------------------------------------------------------------------

    def rest(self) -> float:
        """Seconds until the deadline.

        Raises:
            CancelledError: the job was cancelled.
            DeadlineError: the deadline has passed.
        """
        if self._cancelled:
            raise CancelledError(f"cancelled in phase {self.phase.value}")
        rest = self._ends_at - time.monotonic()
        if rest <= 0:
            raise DeadlineError(f"the deadline passed in phase {self.phase.value}")
        return rest

    @property
    def cancelled(self) -> bool:
        """Whether :meth:`cancel` was called."""
        return self._cancelled

    def begin(self, report: Report) -> None:
        """The plan is known."""
        with self._lock:
            self._report = self._wave = report

    def begin_wave(self, wave: Report, *, more: bool) -> None:
        """One of several waves begins; with ``more``, its end is not that of the job."""
        with self._lock:
            self._wave = wave
            self._more = more
            if self._report is not None:
                self._report.waves.append(wave)

    def enter(self, phase: Phase, *, lost: bool = False) -> None:
        """Go on to the next phase, which the protocol must allow; see :meth:`Course.enter`."""
        with self._lock:
            now = time.monotonic_ns()
            before = self.phase
            self.course.enter(phase, lost=lost)
            if self._wave is not None:
                self._wave.phases.append(PhaseSpan(before, self._since_ns, now))
            self._since_ns = now
            if phase.is_final and self._wave is not self._report:
                if self._report is not None and self._wave is not None:
                    self._report.absorb(self._wave)
                self._wave = self._report
            if phase is Phase.DONE and self._more and self._error is None:
                # The next wave is an epoch of its own and takes the same course from its beginning.
                self.course = Course()
                phase = self.course.phase
            self._lock.notify_all()
        if self._on_phase is not None:
            self._on_phase(phase)

    def end(self) -> None:
        """Nothing more happens, in whatever phase the job is."""
        with self._lock:
            self._over = True
            self._lock.notify_all()

    def absolve(self) -> None:
        """What was noted as the reason for an abort did not lead to one."""
        with self._lock:
            self._error = None

    def check(self) -> None:
        """Raise why the job did not end as it was meant to, if so."""
        if self._error is not None:
            raise self._error

    def leave(self) -> None:
        """Let a decided job's thread end: what is left of it is for a coordinator to come."""
        self._left = True

    def check_left(self) -> None:
        """Raise ClosedError once :meth:`leave` was called."""
        if self._left:
            raise ClosedError(f"the coordinator was closed in phase {self.phase.value}")

    def fail(self, error: PipeliveError) -> None:
        """Note why the job does not end as it was meant to."""
        with self._lock:
            self._error = error
            for report in (self._report, self._wave):
                if report is not None:
                    report.reason = str(error)

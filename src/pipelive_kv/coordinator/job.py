"""One reconfiguration under way."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from pipelive_kv.coordinator.report import Phase, PhaseSpan, Report
from pipelive_kv.errors import CancelledError, DeadlineError, PipeliveError


class Job:
    """A handle on a reconfiguration that runs in a thread of the coordinator."""

    def __init__(self, timeout: float, on_phase: Callable[[Phase], None] | None) -> None:
        self._lock = threading.Condition()
        self._phase = Phase.PLANNED
        self._since_ns = time.monotonic_ns()
        self._ends_at = time.monotonic() + timeout
        self._on_phase = on_phase
        self._cancelled = False
        self._error: PipeliveError | None = None
        self._report: Report | None = None

    @property
    def phase(self) -> Phase:
        """The phase it is in."""
        return self._phase

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

    def wait(self, timeout: float | None = None) -> Report:
        """Wait for the end.

        Raises:
            DeadlineError: it did not end within ``timeout`` seconds; it goes on.
            PipeliveError: why it was refused or given up; the old placement serves.
        """
        end = None if timeout is None else time.monotonic() + timeout
        with self._lock:
            while not self._phase.is_final:
                rest = None if end is None else end - time.monotonic()
                if rest is not None and rest <= 0:
                    raise DeadlineError(
                        f"the reconfiguration did not end within {timeout:g} s; it is in phase "
                        f"{self._phase.value}"
                    )
                self._lock.wait(rest)
            if self._error is not None:
                raise self._error
            if self._report is None:
                raise CancelledError("the job has no report")
            return self._report

    # -- for the coordinator -----------------------------------------------------------------------

    def rest(self) -> float:
        """Seconds until the deadline.

        Raises:
            CancelledError: the job was cancelled.
            DeadlineError: the deadline has passed.
        """
        if self._cancelled:
            raise CancelledError(f"cancelled in phase {self._phase.value}")
        rest = self._ends_at - time.monotonic()
        if rest <= 0:
            raise DeadlineError(f"the deadline passed in phase {self._phase.value}")
        return rest

    @property
    def cancelled(self) -> bool:
        """Whether :meth:`cancel` was called."""
        return self._cancelled

    def begin(self, report: Report) -> None:
        """The plan is known."""
        with self._lock:
            self._report = report

    def enter(self, phase: Phase) -> None:
        """Go on to the next phase."""
        with self._lock:
            now = time.monotonic_ns()
            if self._report is not None:
                self._report.phases.append(PhaseSpan(self._phase, self._since_ns, now))
            self._phase, self._since_ns = phase, now
            self._lock.notify_all()
        if self._on_phase is not None:
            self._on_phase(phase)

    def fail(self, error: PipeliveError) -> None:
        """Note why the job does not end as it was meant to."""
        with self._lock:
            self._error = error
            if self._report is not None:
                self._report.reason = str(error)

"""The reconfigurations of an engine, by number: each caller asks for its own."""

from __future__ import annotations

from typing import Any

from pipelive_kv.coordinator import Job
from pipelive_kv.errors import InvalidArgumentError, PipeliveError

KEPT = 16
"""Reconfigurations whose outcomes can still be asked for."""


class Jobs:
    """The last reconfigurations, numbered from 1 on. For one thread, the engine core's."""

    def __init__(self) -> None:
        self._jobs: dict[int, Job] = {}
        self._number = 0
        self._uncounted: dict[int, Job] = {}

    def add(self, job: Job) -> int:
        """Note one that has just begun; its number."""
        self._number += 1
        self._jobs[self._number] = job
        self._uncounted[self._number] = job
        for jobs in (self._jobs, self._uncounted):
            jobs.pop(self._number - KEPT, None)
        return self._number

    @property
    def last(self) -> Job | None:
        """The one begun last."""
        return self._jobs.get(self._number)

    @property
    def is_under_way(self) -> bool:
        """Whether the one begun last goes on."""
        return self.last is not None and not self.last.is_over

    def cancel(self) -> None:
        """Give the one under way up, unless it is decided, and let its lease go."""
        if self.last is not None:
            for one in filter(None, (self.last, self.last.lease)):
                one.cancel()

    def proceed(self) -> None:
        """Let one that was begun with ``pause`` be decided."""
        if self.last is not None:
            self.last.proceed()

    def count(self) -> list[dict[str, Any]]:
        """Those that have ended since this was last asked, for counters: each is told once."""
        over = [number for number, job in self._uncounted.items() if job.is_over]
        return [{"number": n, **_describe(self._uncounted.pop(n))} for n in over]

    def describe(self, number: int | None = None) -> dict[str, Any] | None:
        """Where one stands, by default the last; None where there was none.

        Raises:
            InvalidArgumentError: there is none of that number, or no longer.
        """
        if number is None:
            number = self._number
        elif number not in self._jobs:
            raise InvalidArgumentError(
                f"job is {number}, expected "
                + (f"{min(self._jobs)} to {self._number}" if self._jobs else "none: none was begun")
            )
        job = self._jobs.get(number)
        return None if job is None else {"number": number, **_describe(job)}


def _lease(lease: Job | None) -> dict[str, Any] | None:
    """How the way back stands; no other move begins before it is taken or over."""
    if lease is None:
        return None
    return {"phase": lease.phase.value, "final": lease.is_over}


def _describe(job: Job) -> dict[str, Any]:
    # A job whose record cannot be written is over in whatever phase it is in.
    over = job.is_over
    found: dict[str, Any] = {
        "phase": job.phase.value,
        "final": over,
        "error": None,
        "lease": _lease(job.lease),
    }
    if over:
        try:
            job.wait(timeout=0)
        except PipeliveError as error:
            found["error"] = {"type": type(error).__name__, "message": str(error)}
    try:
        report = job.report
    except PipeliveError:
        return found  # nothing is planned yet, or nothing ever was
    return found | {
        "from": list(report.old.counts),
        "to": list(report.new.counts),
        "left_at": list(report.placement.counts),
        "dry_run": report.dry_run,
        "switched_at_step": report.step,
        "stop_ms": report.stop_s * 1e3,
        "decision_wait_ms": report.decision_wait_s * 1e3,
        "seconds": report.seconds,
        "bytes_moved": report.bytes_moved,
        "rounds": len(report.rounds),
        "blocks_moved": report.blocks_moved,
        "capacity": [report.capacity_before, report.capacity_during, report.capacity_after],
        "phases_ms": {
            span.phase.value: (span.end_ns - span.start_ns) / 1e6 for span in report.phases
        },
    }

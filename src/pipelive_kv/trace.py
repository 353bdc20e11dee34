"""Traces that chrome://tracing and https://ui.perfetto.dev open: steps, phases, rounds, gates.

All times are nanoseconds of the host's monotonic clock (``time.monotonic_ns``), which processes of
one machine share.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from pipelive_kv.coordinator import Report

__all__ = ["Trace", "Track"]


@dataclass(frozen=True)
class Track:
    """One line of the trace: a thread of a process."""

    process: int
    thread: int


class Trace:
    """Collects events and writes them in the Trace Event Format.

    Args:
        start_ns: the time that becomes 0.
    """

    def __init__(self, start_ns: int) -> None:
        self._start_ns = start_ns
        self._events: list[dict[str, Any]] = []
        self._processes: dict[str, int] = {}
        self._tracks: dict[tuple[str, str], Track] = {}

    def __len__(self) -> int:
        return len(self._events)

    def process(self, name: str, pid: int | None = None) -> int:
        """Name a process; the same name gives the same number. ``pid`` is shown as it is."""
        if name not in self._processes:
            number = pid if pid is not None else 1 + len(self._processes)
            while number in self._processes.values():
                number += 1
            order = len(self._processes)
            self._processes[name] = number
            self._name("process_name", number, 0, {"name": name})
            self._name("process_sort_index", number, 0, {"sort_index": order})
        return self._processes[name]

    def track(self, process: str, name: str) -> Track:
        """The track ``name`` of a process; made where there is none yet."""
        key = (process, name)
        if key not in self._tracks:
            number = self.process(process)
            order = 1 + sum(owner == process for owner, _ in self._tracks)
            self._tracks[key] = Track(number, order)
            self._name("thread_name", number, order, {"name": name})
            self._name("thread_sort_index", number, order, {"sort_index": order})
        return self._tracks[key]

    def span(self, track: Track, name: str, start_ns: int, end_ns: int, **about: Any) -> None:
        """Something that took from ``start_ns`` to ``end_ns``; spans of a track may only nest."""
        self._events.append(
            {
                "ph": "X",
                "name": name,
                "pid": track.process,
                "tid": track.thread,
                "ts": self._microseconds(start_ns),
                "dur": max(0.0, (end_ns - start_ns) / 1e3),
                "args": about,
            }
        )

    def instant(self, track: Track, name: str, at_ns: int, **about: Any) -> None:
        """Something that happened at one moment."""
        self._events.append(
            {
                "ph": "i",
                "s": "p",
                "name": name,
                "pid": track.process,
                "tid": track.thread,
                "ts": self._microseconds(at_ns),
                "args": about,
            }
        )

    def counter(self, process: str, name: str, at_ns: int, values: Mapping[str, float]) -> None:
        """Numbers from ``at_ns`` on, drawn as areas on top of each other."""
        self._events.append(
            {
                "ph": "C",
                "name": name,
                "pid": self.process(process),
                "tid": 0,
                "ts": self._microseconds(at_ns),
                "args": dict(values),
            }
        )

    def add_report(self, report: Report, *, coordinator: str = "coordinator") -> None:
        """Add a reconfiguration: its phases, and on every stage its rounds, gate and switchover."""
        about = f"epoch {report.epoch}: {report.old} to {report.new}"
        phases = self.track(coordinator, "phases")
        for span in report.phases:
            self.span(phases, span.phase.value, span.start_ns, span.end_ns, reconfiguration=about)
        for stage in report.stages:
            process = f"stage {stage.rank}"
            for record in stage.rounds:
                self.span(
                    self.track(process, "patches"),
                    "bulk copy" if record.number == 0 else f"round {record.number}",
                    record.start_ns,
                    record.end_ns,
                    epoch=report.epoch,
                    slots=record.slots,
                    bytes=record.bytes,
                    records=record.records,
                    through_seq=record.through_seq,
                    lag_steps=record.lag_steps,
                )
            switchover = self.track(process, "switchover")
            self.instant(switchover, f"switchover: step {stage.step}", stage.first_new_start_ns)
            activate_ns, gate_ns = int(stage.activate_s * 1e9), int(stage.gate_s * 1e9)
            self.span(
                switchover,
                "activate",
                stage.first_new_start_ns - activate_ns,
                stage.first_new_start_ns,
                epoch=report.epoch,
            )
            if stage.gate_s > 0:
                # The gates of single layers are not kept apart: their sum is drawn as one.
                self.span(
                    switchover,
                    "gate",
                    stage.first_new_start_ns,
                    stage.first_new_start_ns + gate_ns,
                    epoch=report.epoch,
                )

    def to_bytes(self) -> bytes:
        """The trace as JSON."""
        return msgspec.json.encode({"traceEvents": self._events, "displayTimeUnit": "ms"})

    def write(self, path: str | os.PathLike[str]) -> None:
        """Write the trace to a file."""
        Path(path).write_bytes(self.to_bytes())

    def _microseconds(self, at_ns: int) -> float:
        return (at_ns - self._start_ns) / 1e3

    def _name(self, kind: str, process: int, thread: int, about: dict[str, Any]) -> None:
        self._events.append({"ph": "M", "name": kind, "pid": process, "tid": thread, "args": about})

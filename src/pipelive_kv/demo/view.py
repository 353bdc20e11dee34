"""What a person sees while the demo runs: the events, and a view that prints them as lines."""

from __future__ import annotations

import threading
import time
from typing import TextIO

from pipelive_kv.coordinator import Phase
from pipelive_kv.demo.recorder import Sample, Switchover
from pipelive_kv.demo.report import RestartReport
from pipelive_kv.demo.setup import Setup
from pipelive_kv.placement import Placement


class View:
    """Shows nothing. The methods are called from several threads."""

    def say(self, text: str) -> None:
        """Something that is worth a line."""

    def on_setup(self, setup: Setup) -> None:
        """Model, prompts and sizes are known."""

    def on_run(self, title: str, processes: tuple[int, ...], requests: int) -> None:
        """A run begins; its stage processes are up."""

    def on_token(self, request: int, token: int) -> None:
        """A request got a token."""

    def on_sample(self, sample: Sample) -> None:
        """How the stages stand."""

    def on_move(self, name: str, mode: str, old: Placement, new: Placement) -> None:
        """A reconfiguration begins."""

    def on_phase(self, phase: Phase) -> None:
        """It has entered a phase."""

    def on_switchover(self, switch: Switchover) -> None:
        """A reconfiguration is over."""

    def on_restart(self, report: RestartReport) -> None:
        """The restart is over: every request goes on."""

    def close(self) -> None:
        """Nothing more is shown."""


def outcome_line(switch: Switchover) -> str:
    """One reconfiguration in a line."""
    report = switch.report
    if switch.mode == "no-op":
        return f"{switch.name}: switchover at step {report.step}, nothing moves"
    return (
        f"{switch.name}: {report.old} to {report.new} at step {report.step} in "
        f"{report.seconds:.2f} s, {report.bytes_moved / 1e6:.1f} MB of KV in {len(report.rounds)} "
        f"rounds, {switch.decoding} requests decoding, stop {report.stop_s * 1e3:.2f} ms"
    )


class LineView(View):
    """Prints a line per event and, now and then, one about the tokens.

    Args:
        stream: where to.
        seconds: between two lines about tokens.
    """

    def __init__(self, stream: TextIO, seconds: float = 5.0) -> None:
        self._stream = stream
        self._seconds = seconds
        self._lock = threading.Lock()
        self._started = time.monotonic()
        self._tokens = 0
        self._last_tokens = 0
        self._last_line = self._started

    def say(self, text: str) -> None:
        """Print a line."""
        with self._lock:
            elapsed = time.monotonic() - self._started
            print(f"{elapsed:6.1f} s  {text}", file=self._stream, flush=True)

    def on_setup(self, setup: Setup) -> None:
        """Print what is run."""
        shortest = min(len(request.prompt) for request in setup.requests)
        self.say(
            f"{setup.name}, {setup.source.num_layers} layers on {setup.source.num_stages} stages: "
            f"{setup.source} to {setup.target} and back; {len(setup.requests)} requests with "
            f"prompts of {shortest} tokens or more, {setup.requests[0].max_new_tokens} new tokens "
            f"each; {setup.budget_bytes / 2**20:.0f} MiB per stage"
        )

    def on_run(self, title: str, processes: tuple[int, ...], requests: int) -> None:
        """Print the title."""
        self.say(f"{title}: {requests} requests, stage processes {', '.join(map(str, processes))}")

    def on_token(self, request: int, token: int) -> None:
        """Count."""
        self._tokens += 1
        now = time.monotonic()
        if now - self._last_line >= self._seconds:
            rate = (self._tokens - self._last_tokens) / (now - self._last_line)
            self._last_line, self._last_tokens = now, self._tokens
            self.say(f"{self._tokens} tokens, {rate:.1f} per second")

    def on_phase(self, phase: Phase) -> None:
        """Print the phases that take time."""
        if phase in (Phase.ABORTING, Phase.ABORTED):
            self.say(f"phase {phase.value}")

    def on_switchover(self, switch: Switchover) -> None:
        """Print what it was."""
        self.say(outcome_line(switch))

    def on_restart(self, report: RestartReport) -> None:
        """Print how long it took."""
        self.say(
            f"restart: {report.requests} requests waited {report.stop_ms / 1e3:.1f} s, "
            f"{report.tokens_recomputed} tokens computed again"
        )

"""What is seen while an engine runs: steps, tokens, and samples of how the stages stand."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from pipelive_kv.coordinator import Coordinator, Report
from pipelive_kv.engines.reference import StepRecord
from pipelive_kv.errors import PipeliveError
from pipelive_kv.messages import Progress

SAMPLE_SECONDS = 0.1


@dataclass(frozen=True)
class Token:
    """A token that came back; ``at`` in seconds of ``time.monotonic()``."""

    request: int
    token: int
    seq: int
    at: float


@dataclass(frozen=True)
class Sample:
    """How all stages stood at one moment."""

    at: float
    stages: tuple[Progress, ...]


@dataclass(frozen=True)
class Switchover:
    """A reconfiguration and what was going on when it was made."""

    name: str
    mode: str
    """``live``, ``stop_and_copy``, or ``no-op`` where nothing moved."""
    report: Report
    decoding: int
    """Requests that were past their prompt and not at their end at the switchover."""


@dataclass
class Recorder:
    """Everything that was seen of one run of an engine; callbacks for ``Engine.run``."""

    started: float = field(default_factory=time.monotonic)
    steps: list[StepRecord] = field(default_factory=list)
    tokens: list[Token] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    switchovers: list[Switchover] = field(default_factory=list)
    ended: float = 0.0
    _pending: list[tuple[int, int, float]] = field(default_factory=list)

    def on_token(self, request: int, token: int, at: float) -> None:
        """A token came back; its step is told next."""
        self._pending.append((request, token, at))

    def on_step(self, step: StepRecord) -> None:
        """A step is over: the tokens told since the last one are its own."""
        self.tokens += [Token(r, token, step.seq, at) for r, token, at in self._pending]
        self._pending.clear()
        self.steps.append(step)

    def tokens_of(self, request: int) -> list[Token]:
        """The tokens of one request, in order."""
        return [token for token in self.tokens if token.request == request]

    @property
    def requests(self) -> list[int]:
        """The requests that have got a token, ascending."""
        return sorted({token.request for token in self.tokens})

    def peak_bytes(self) -> tuple[int, ...]:
        """The most memory that each stage has ever held, by rank."""
        if not self.samples:
            return ()
        return tuple(
            max(sample.stages[rank].peak_bytes for sample in self.samples)
            for rank in range(len(self.samples[0].stages))
        )


class Sampler:
    """Asks the stages now and then how they stand, in a thread of its own.

    Args:
        coordinator: whom to ask.
        recorder: where the answers go.
        on_sample: called with each of them, in the sampler's thread.
        seconds: between two questions.
    """

    def __init__(
        self,
        coordinator: Coordinator,
        recorder: Recorder,
        on_sample: Callable[[Sample], None] | None = None,
        seconds: float = SAMPLE_SECONDS,
    ) -> None:
        self._coordinator = coordinator
        self._recorder = recorder
        self._on_sample = on_sample
        self._seconds = seconds
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="pipelive-demo-sampler", daemon=True)

    def __enter__(self) -> Sampler:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        self._thread.join(timeout=10)

    def _run(self) -> None:
        while not self._stopping.wait(self._seconds):
            try:
                stages = self._coordinator.observe(timeout=5.0)
            except PipeliveError:
                continue  # a stage that is starting, ending or busy: the next sample tells more
            sample = Sample(time.monotonic(), stages)
            self._recorder.samples.append(sample)
            if self._on_sample is not None:
                self._on_sample(sample)

"""The reference engine under a constant load of decoding requests, for the benchmarks that time it.

Requests run all the time: each that ends is replaced at once. A script, a generator that is resumed
at every finished step, decides what happens meanwhile.
"""

from __future__ import annotations

import contextlib
import itertools
import random
from bisect import bisect_left
from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelive_kv.engines.reference import Engine, EngineConfig, Request, StepRecord
from pipelive_kv.models.smollm import smollm2
from pipelive_kv.models.tiny import tiny_model
from pipelive_kv.placement import Placement

Script = Generator[None, None, None]
BLOCK_SIZE = 16
CHUNK = 32
LANES = 2


@dataclass(frozen=True)
class Token:
    """A token of a request: which step drew it, and when it came back (monotonic seconds)."""

    seq: int
    at: float


class _ScriptOverError(Exception):
    """Leaves ``Engine.run`` with requests still running."""


def model_folder(name: str, scratch: Path) -> Path:
    """A model's folder: "smollm2", "tiny", or a path."""
    if name == "smollm2":
        return smollm2()
    return tiny_model("llama", scratch) if name == "tiny" else Path(name)


def engine_config(model: Path, placement: Placement, batch: int, **more: Any) -> EngineConfig:
    """A configuration with room for two lanes of ``batch`` requests of ``max_tokens``."""
    tokens = more.pop("max_tokens", 512)
    blocks = 1 + LANES * batch * -(-tokens // BLOCK_SIZE)
    return EngineConfig(
        model=model,
        placement=placement,
        block_size=BLOCK_SIZE,
        max_blocks=blocks,
        lanes=LANES,
        max_batch=batch,
        chunk=CHUNK,
        max_tokens=tokens,
        **more,
    )


class LoadedEngine:
    """Runs a script over an engine and keeps every step and token."""

    def __init__(self, engine: Engine, *, new_tokens: int, seed: int) -> None:
        self.engine = engine
        self.steps: dict[int, StepRecord] = {}
        self.tokens: dict[int, list[Token]] = {}
        self._random = random.Random(seed)
        self._new_tokens = new_tokens
        self._left: dict[int, int] = {}
        self._fresh: list[tuple[int, float]] = []

    def play(self, script: Script) -> None:
        """Run until the script is over."""
        config = self.engine.config
        rows = config.lanes * config.max_batch
        for index in range(rows):
            # Of unlike lengths, so that later on they do not all end at once.
            self._submit(self._new_tokens * (index + 1) // rows)

        def on_step(step: StepRecord) -> None:
            self.steps[step.seq] = step
            for request, at in self._fresh:
                self.tokens[request].append(Token(step.seq, at))
            self._fresh.clear()
            if next(script, self) is self:
                raise _ScriptOverError

        with contextlib.suppress(_ScriptOverError):
            self.engine.run(on_token=self._on_token, on_step=on_step)

    def _submit(self, length: int) -> None:
        prompt = tuple(self._random.randrange(3, 150) for _ in range(CHUNK))
        request = Request(prompt, max(2, length), stop_at_eos=False)
        number = self.engine.submit(request)
        self.tokens[number] = []
        self._left[number] = request.max_new_tokens

    def _on_token(self, request: int, _: int, at: float) -> None:
        self._fresh.append((request, at))
        self._left[request] -= 1
        if not self._left[request]:
            self._submit(self._new_tokens)

    def wait_steps(self, count: int) -> Script:
        """Let that many steps pass."""
        for _ in range(count):
            yield

    def wait_until(self, ready: Callable[[], bool]) -> Script:
        """Let steps pass until ``ready()``."""
        while not ready():
            yield

    def gaps(self) -> list[tuple[Token, Token]]:
        """Neighbouring tokens of each request between which no prompt was run."""
        prefills = sorted(seq for seq, step in self.steps.items() if step.kind == "prefill")
        found: list[tuple[Token, Token]] = []
        for tokens in self.tokens.values():
            for last, token in itertools.pairwise(tokens):
                # Steps around a token's own are in flight at the same time, on other stages.
                if not _any_between(prefills, last.seq - LANES, token.seq):
                    found.append((last, token))
        return found


def _any_between(ordered: list[int], low: int, high: int) -> bool:
    at = bisect_left(ordered, low)
    return at < len(ordered) and ordered[at] <= high

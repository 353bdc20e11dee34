"""An engine under load that checks every token, and what its stages hold."""

from __future__ import annotations

import shutil
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pipelive_kv.engines.reference import Engine, EngineConfig, Request
from pipelive_kv.errors import PipeliveError
from pipelive_kv.placement import Placement

from .agent import Agent, Agents, Command, Held

PROMPTS = 12
STREAMS = 6
OURS = ("pipelive-patch", "pipelive-apply", "pipelive-background", "chaos-relay", "chaos-accept")
"""Threads that live for a reconfiguration and no longer."""


def request(number: int) -> Request:
    """The ``number``-th of the prompts that are asked again and again."""
    return Request(
        tuple((11 * number + k * k) % 150 + 3 for k in range(10 + 7 * (number % 5))),
        30 + 5 * (number % 4),
        temperature=float(number % 2),
        seed=number,
        stop_at_eos=False,
    )


def engine_config(path: Path, counts: Sequence[int], **settings: object) -> EngineConfig:
    """Small blocks and pages, so that little data makes many of them."""
    given = {
        "block_size": 8,
        "chunk": 16,
        "page_bytes": 64 << 10,
        "max_blocks": 128,
        "step_timeout": 60.0,
        **settings,
    }
    return EngineConfig(path, Placement.from_counts(counts), **given)


def expected_tokens(path: Path, counts: Sequence[int]) -> list[list[int]]:
    """What each prompt gives where nothing moves."""
    with Engine(engine_config(path, counts, reconfigurable=False)) as engine:
        numbers = [engine.submit(request(i)) for i in range(PROMPTS)]
        results = engine.run()
    return [results[number].tokens for number in numbers]


@dataclass
class _Stream:
    prompt: int
    tokens: list[int]


class Service:
    """Serves the prompts in a thread of its own until it is closed or dies."""

    def __init__(
        self, path: Path, counts: Sequence[int], expected: list[list[int]], **settings: object
    ) -> None:
        self.expected = expected
        self.finished = 0
        self.wrong: list[str] = []
        self.died: PipeliveError | None = None
        self._steps = 0
        self._next_prompt = 0
        self._streams: dict[int, _Stream] = {}
        self._stopping = threading.Event()
        self._changed = threading.Condition()
        self._directory = tempfile.mkdtemp(prefix="pk-chaos-")
        self.engine = Engine(
            engine_config(path, counts, wrap_hooks=Agent(self._directory), **settings)
        )
        self.agents = Agents(self._directory, self.engine.pids)
        self._asking = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="chaos-load", daemon=True)
        self._submit_more()
        self._thread.start()

    @property
    def pids(self) -> tuple[int, ...]:
        """The stages' process ids."""
        return self.engine.pids

    def tell(self, rank: int, command: Command) -> Held:
        """Have a stage's agent do something; from any thread."""
        with self._asking:
            return self.agents.ask(rank, command)

    def held(self) -> list[Held]:
        """What every stage holds now."""
        with self._asking:
            return self.agents.ask_all(Command("inspect"))

    def calm(self) -> None:
        """Undo the faults that have not struck."""
        with self._asking:
            self.agents.ask_all(Command("calm"))

    def burst(self, count: int) -> None:
        """Hand in ``count`` more requests at once."""
        for _ in range(count):
            self._submit()

    def await_steps(self, count: int, timeout: float = 60.0) -> None:
        """Wait until so many more steps have ended, or the service has died."""
        with self._changed:
            goal = self._steps + count
            if not self._changed.wait_for(
                lambda: self._steps >= goal or self.died is not None, timeout
            ):
                raise PipeliveError(f"the service made no {count} steps within {timeout:g} s")

    def await_finished(self, count: int, timeout: float = 60.0) -> None:
        """Wait until so many more requests have ended, or the service has died."""
        with self._changed:
            goal = self.finished + count
            if not self._changed.wait_for(
                lambda: self.finished >= goal or self.died is not None, timeout
            ):
                raise PipeliveError(f"the service ended no {count} requests in {timeout:g} s")

    def await_death(self, timeout: float) -> PipeliveError | None:
        """Wait until the service has ended with an error; None where it has not."""
        with self._changed:
            self._changed.wait_for(lambda: self.died is not None, timeout)
            return self.died

    def await_rest(self, timeout: float = 30.0) -> list[Held]:
        """Wait until no thread of a reconfiguration is left; what is held then."""
        end = time.monotonic() + timeout
        while True:
            held = self.held()
            left = [name for stage in held for name in stage.threads if name.startswith(OURS)]
            if not left:
                return held
            if time.monotonic() > end:
                raise PipeliveError(f"threads are left after {timeout:g} s: {left}")
            self.await_steps(1)

    def close(self) -> float:
        """Stop serving; seconds that closing the engine took."""
        self._stopping.set()
        self._thread.join(timeout=120)
        start = time.monotonic()
        self.engine.close()
        seconds = time.monotonic() - start
        self.agents.close()
        shutil.rmtree(self._directory, ignore_errors=True)
        return seconds

    # -- the load ------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            self.engine.run(
                until=self._stopping.is_set, on_token=self._on_token, on_step=self._on_step
            )
        except PipeliveError as error:
            with self._changed:
                self.died = error
                self._changed.notify_all()

    def _submit(self) -> None:
        prompt = self._next_prompt % PROMPTS
        self._next_prompt += 1
        # The run thread cannot hand out its first token before this returns to it or it is here.
        with self._changed:
            number = self.engine.submit(request(prompt))
            self._streams[number] = _Stream(prompt, [])

    def _submit_more(self) -> None:
        while not self._stopping.is_set() and len(self._streams) < STREAMS:
            self._submit()

    def _on_token(self, number: int, token: int, _: float) -> None:
        with self._changed:
            stream = self._streams[number]
            stream.tokens.append(token)
            wanted = self.expected[stream.prompt]
            at = len(stream.tokens) - 1
            if token != wanted[at] and len(self.wrong) < 10:
                self.wrong.append(
                    f"request {number} (prompt {stream.prompt}): token {at} is {token}, "
                    f"expected {wanted[at]}"
                )
            if len(stream.tokens) < len(wanted):
                return
            del self._streams[number]
            self.finished += 1
            self._changed.notify_all()
        self._submit_more()

    def _on_step(self, _: object) -> None:
        with self._changed:
            self._steps += 1
            self._changed.notify_all()

"""What happens when: the moved run, and the unmoved one that it is compared with."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass, field

from pipelive_kv.coordinator import Job, MigrationOptions, Phase
from pipelive_kv.demo.recorder import Recorder, Sampler, Switchover
from pipelive_kv.demo.setup import Setup
from pipelive_kv.demo.view import View
from pipelive_kv.engines.reference import Engine, Request, StepRecord
from pipelive_kv.placement import Placement

MOVE_TIMEOUT = 120.0

Script = Generator[None, None, None]


@dataclass(frozen=True)
class Pace:
    """How many tokens go by between the parts of the moved run.

    Attributes:
        warm: every request has got that many before the first reconfiguration.
        settle: steps between two reconfigurations.
        cycles: moves there and back.
    """

    warm: int = 8
    settle: int = 10
    cycles: int = 2


@dataclass
class Arrival:
    """A request that came in while layers were moving."""

    request: int
    step: int
    move: str
    phase: str


@dataclass
class Outcome:
    """What a run has brought."""

    recorder: Recorder
    processes: tuple[int, ...]
    arrivals: list[Arrival] = field(default_factory=list)


class ScriptedRun:
    """Runs an engine and takes a script one step further after each of the engine's steps.

    The script is a generator: it yields where it waits for the next step.
    """

    def __init__(self, engine: Engine, view: View) -> None:
        self.engine = engine
        self.view = view
        self.recorder = Recorder()
        self.submitted: list[Request] = []
        self._first_id = 0
        self._script: Script | None = None

    def submit(self, request: Request) -> int:
        """Hand a request to the engine; the requests of a run are numbered from 0."""
        number = self.engine.submit(request)
        if not self.submitted:
            self._first_id = number
        self.submitted.append(request)
        return number - self._first_id

    def play(self, script: Script | None) -> Outcome:
        """Run until the script is over and every request served."""
        self._script = script
        self.recorder.started = time.monotonic()
        with Sampler(self.engine.coordinator, self.recorder, self.view.on_sample):
            try:
                self.engine.run(until=self._is_over, on_token=self._on_token, on_step=self._on_step)
            finally:
                self.recorder.ended = time.monotonic()
        return Outcome(self.recorder, self.engine.pids)

    def decoding(self) -> int:
        """Requests that have a first token and not yet their last one."""
        counts: dict[int, int] = {}
        for token in self.recorder.tokens:
            counts[token.request] = counts.get(token.request, 0) + 1
        return sum(
            0 < counts.get(number, 0) < request.max_new_tokens
            for number, request in enumerate(self.submitted)
        )

    def wait_tokens(self, count: int) -> Script:
        """Until every request has ``count`` tokens (or all of its own)."""
        wanted = [min(count, request.max_new_tokens) for request in self.submitted]
        while True:
            have = [0] * len(wanted)
            for token in self.recorder.tokens:
                have[token.request] += 1
            if all(h >= w for h, w in zip(have, wanted, strict=True)):
                return
            yield

    def wait_steps(self, count: int) -> Script:
        """Until ``count`` more steps are over, or nothing runs any more."""
        until = len(self.recorder.steps) + count
        while len(self.recorder.steps) < until and self.decoding():
            yield

    def reconfigure(
        self,
        name: str,
        placement: Placement,
        *,
        mode: str = "live",
        in_the_middle: Callable[[Job], None] | None = None,
    ) -> Script:
        """Make a reconfiguration and wait for its end.

        ``in_the_middle`` is called once, while the bulk of the KV and the weights are on their way.
        """
        options = MigrationOptions(
            mode="stop_and_copy" if mode == "stop_and_copy" else "live", keep_capacity=False
        )
        self.view.on_move(name, mode, self.engine.placement, placement)
        job = self.engine.reconfigure(
            placement, timeout=MOVE_TIMEOUT, options=options, on_phase=self.view.on_phase
        )
        decoding = self.decoding()
        while not job.phase.is_final:
            if in_the_middle is not None and job.phase in (Phase.STAGING, Phase.PATCHING):
                in_the_middle(job)
                in_the_middle = None
            decoding = self.decoding()
            yield
        switch = Switchover(name, mode, job.wait(0), decoding)
        self.recorder.switchovers.append(switch)
        self.view.on_switchover(switch)

    def _is_over(self) -> bool:
        self._advance()
        return self._script is None

    def _advance(self) -> None:
        if self._script is not None and next(self._script, self) is self:
            self._script = None

    def _on_token(self, request: int, token: int, at: float) -> None:
        number = request - self._first_id
        self.recorder.on_token(number, token, at)
        self.view.on_token(number, token)

    def _on_step(self, step: StepRecord) -> None:
        self.recorder.on_step(step)
        self._advance()


def moved_run(engine: Engine, setup: Setup, pace: Pace, view: View) -> Outcome:
    """Move layers there and back while every request decodes; one arrives inside the first move.

    Before each move and after the last one there is a switchover that changes nothing: what its
    gaps have, those of the others have in any case.
    """
    run = ScriptedRun(engine, view)
    *first, late = setup.requests
    arrivals: list[Arrival] = []
    for request in first:
        run.submit(request)

    def arrive(job: Job) -> None:
        step = engine.scheduler.next_seq
        number = run.submit(dataclasses.replace(late, arrival_step=step))
        arrivals.append(Arrival(number, step, names[0], job.phase.value))
        view.say(f"request {number} arrives at step {step}, in phase {job.phase.value}")

    names = [f"move {number + 1}" for number in range(2 * pace.cycles)]

    def script() -> Script:
        yield from run.wait_tokens(pace.warm)
        for number, name in enumerate(names):
            yield from run.reconfigure(f"no-op {number + 1}", engine.placement, mode="no-op")
            yield from run.wait_steps(pace.settle)
            yield from run.reconfigure(
                name,
                setup.source if number % 2 else setup.target,
                in_the_middle=None if number else arrive,
            )
            yield from run.wait_steps(pace.settle)
        yield from run.reconfigure(f"no-op {len(names) + 1}", engine.placement, mode="no-op")

    outcome = run.play(script())
    outcome.arrivals = arrivals
    return outcome


def unmoved_run(engine: Engine, setup: Setup, arrivals: list[Arrival], view: View) -> Outcome:
    """The same requests, arriving at the same steps, without any reconfiguration."""
    run = ScriptedRun(engine, view)
    steps = {arrival.request: arrival.step for arrival in arrivals}
    for number, request in enumerate(setup.requests):
        run.submit(dataclasses.replace(request, arrival_step=steps.get(number, 0)))
    return run.play(None)

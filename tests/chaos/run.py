"""Chaos: ``python -m tests.chaos.run --trials 200 --seed 7 --json build/chaos.json``."""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

from pipelive_kv.errors import PipeliveError
from pipelive_kv.models.tiny import tiny_model

from .cases import CASES, ENDED, Case
from .service import Service, expected_tokens
from .trial import Outcome, Run

COUNTS = {2: (3, 3), 3: (2, 2, 2)}
CLOSE_WITHIN = 60.0


def all_cases() -> list[tuple[Case, str]]:
    """Every case in every phase it is tried in."""
    return [(case, phase) for case in CASES for phase in case.phases]


class Chaos:
    """Runs trials; starts a new service where one has ended or another transport is needed.

    Args:
        seed: of everything that is random; printed by who runs it.
        say: told of every trial.
    """

    def __init__(self, seed: int, say: Callable[[str], None] = print) -> None:
        self._dice = random.Random(seed)
        self._say = say
        self._expected: dict[int, list[list[int]]] = {}
        self._run: Run | None = None
        self._kind: tuple[int, str] = (0, "")
        self._folder = tempfile.TemporaryDirectory(prefix="pk-chaos-model-")
        self._model = tiny_model("qwen3", Path(self._folder.name))

    def trials(self, cases: list[tuple[Case, str]]) -> Iterator[Outcome]:
        """Run these, those that can share a service after each other."""
        ordered = sorted(cases, key=lambda pair: (pair[0].transport == "tcp", len(pair[0].says)))
        for number, (case, phase) in enumerate(ordered):
            stages = 2 + number % 2 if self._run is None else self._kind[0]
            kind = (stages, case.transport or (self._kind[1] if self._run else "shm"))
            drained = self._run is not None and not all(self._run.service.engine.placement.counts)
            if (
                self._run is None
                or kind != self._kind
                or (drained and ENDED in case.outcomes[phase])
            ):
                self._restart(kind)
            run = self._run
            if run is None:
                raise PipeliveError("no service")
            seed = self._dice.randrange(1 << 32)
            outcome = run.trial(case, phase, random.Random(seed))
            self._say(
                f"{case.name:45s} {phase:10s} {outcome.outcome:14s} {outcome.seconds:6.2f} s"
                + ("" if outcome.reached else "  (phase not reached)")
                + "".join(f"\n    PROBLEM: {problem}" for problem in outcome.problems)
            )
            yield outcome
            if outcome.problems or run.service.died is not None:
                self._stop()
        self.close()

    def close(self) -> None:
        """End what still runs."""
        self._stop()
        self._folder.cleanup()

    def _restart(self, kind: tuple[int, str]) -> None:
        self._stop()
        stages, transport = kind
        if stages not in self._expected:
            self._expected[stages] = expected_tokens(self._model, COUNTS[stages])
        service = Service(self._model, COUNTS[stages], self._expected[stages], transport=transport)
        self._run, self._kind = Run(service), kind

    def _stop(self) -> None:
        run, self._run = self._run, None
        if run is not None:
            seconds = run.service.close()
            if seconds > CLOSE_WITHIN:
                raise PipeliveError(f"closing the engine took {seconds:.1f} s")


def main() -> int:
    """Run what the command line asks for; 1 where something went wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=0, help="so many; 0: every case once")
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--phase", default="", help="this phase alone")
    parser.add_argument("--json", type=Path, default=None, help="write the outcomes there")
    arguments = parser.parse_args()
    seed = (
        arguments.seed if arguments.seed is not None else random.SystemRandom().randrange(1 << 32)
    )
    print("seed", seed, flush=True)
    dice = random.Random(seed)
    chosen = [
        (case, phase)
        for case, phase in all_cases()
        if arguments.only in case.name and arguments.phase in phase
    ]
    if arguments.trials:
        chosen = [dice.choice(chosen) for _ in range(arguments.trials)]
    start = time.monotonic()
    chaos = Chaos(seed, lambda text: print(text, flush=True))
    try:
        outcomes = list(chaos.trials(chosen))
    finally:
        chaos.close()
    if arguments.json is not None:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(
            json.dumps({"seed": seed, "outcomes": [asdict(outcome) for outcome in outcomes]})
        )
    bad = [outcome for outcome in outcomes if outcome.problems]
    print(
        f"{len(outcomes)} trials in {time.monotonic() - start:.0f} s, "
        f"{len(bad)} with problems, seed {seed}"
    )
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())

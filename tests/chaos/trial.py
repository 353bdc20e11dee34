"""Runs one case in one phase and makes the end check."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass

from pipelive_kv.coordinator import MigrationOptions
from pipelive_kv.errors import PipeliveError
from pipelive_kv.placement import Placement

from .agent import Held
from .cases import ABORTED, DONE, ENDED, Case, Trial
from .service import Service

DEATH_WITHIN = 30.0
"""Seconds from a kill to the error that the engine's caller gets."""


LAZY_DESCRIPTORS = 2
"""Of each thread of the control plane, which comes, with a socket, when it is needed first."""


@dataclass(frozen=True)
class Outcome:
    """How a trial ended.

    Attributes:
        outcome: ``aborted``, ``done`` or ``service ended``.
        error: what the job or the engine said.
        problems: what the end check found; empty where all is as it has to be.
        reached: whether the phase of the fault was reached.
    """

    case: str
    phase: str
    outcome: str
    error: str
    seconds: float
    problems: tuple[str, ...]
    reached: bool


def random_placement(old: Placement, dice: random.Random) -> Placement:
    """Another placement of as many layers over as many stages, stages without layers included."""
    while True:
        cuts = sorted(dice.randint(0, old.num_layers) for _ in range(old.num_stages - 1))
        counts = [high - low for low, high in zip([0, *cuts], [*cuts, old.num_layers], strict=True)]
        if tuple(counts) != tuple(old.counts):
            return Placement.from_counts(counts)


class Run:
    """Trials on one service, and what its stages held at each placement before the first fault."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self._used: dict[tuple[tuple[int, ...], int], tuple[int, ...]] = {}
        self._first: list[Held] = []

    def trial(self, case: Case, phase: str, dice: random.Random) -> Outcome:
        """Run ``case`` in ``phase``."""
        service, engine = self.service, self.service.engine
        held = service.await_rest()
        self._first = self._first or held
        self._note_used(engine.placement, held)
        old = engine.placement
        lethal = ENDED in case.outcomes.get(phase, ())
        new = random_placement(old, dice)
        # Nobody would miss a stage without layers.
        while lethal and not all(new.counts):
            new = random_placement(old, dice)
        source, target = self._a_move(old, new)
        others = [rank for rank in range(old.num_stages) if rank not in (source, target)]
        bystander = dice.choice(others) if others else None
        trial = Trial(service, dice, old, new, source, target, bystander)
        reached = False

        def on_phase(entered: object) -> None:
            nonlocal reached
            if getattr(entered, "value", None) == phase and not reached:
                reached = True
                case.strike(trial)

        options = MigrationOptions(
            **{"max_stop_ms": 1000.0, "verify": dice.random() < 0.5, **case.options}
        )
        start = time.monotonic()
        trial.job = job = engine.reconfigure(
            new, timeout=case.timeout, options=options, on_phase=on_phase
        )
        problems = trial.problems
        error = self._end(job, case, problems)
        for undo in trial.undo:
            undo()
        if service.died is not None or (lethal and reached):
            died = service.await_death(DEATH_WITHIN)
            outcome = ENDED if died is not None else "hung"
            error = str(died).splitlines()[0] if died is not None else error
        else:
            outcome = job.phase.value
            try:
                service.calm()
                if case.recover:
                    engine.coordinator.recover()
                self._check_living(trial, outcome, problems)
            except PipeliveError as problem:
                problems.append(f"end check: {problem}")
            if service.died is not None:
                outcome, error = ENDED, str(service.died).splitlines()[0]
        if reached and outcome not in case.outcomes[phase]:
            problems.append(f"it ended as {outcome!r}, allowed is {case.outcomes[phase]}: {error}")
        if outcome != DONE and reached and case.says and not any(w in error for w in case.says):
            problems.append(f"the error does not say {case.says}: {error!r}")
        if outcome == ABORTED and error and "phase" not in error:
            problems.append(f"the error does not name the phase: {error!r}")
        problems += service.wrong
        return Outcome(
            case.name,
            phase,
            outcome,
            error,
            time.monotonic() - start,
            tuple(problems),
            reached,
        )

    def _end(self, job: object, case: Case, problems: list[str]) -> str:
        """Wait for the job; what it says."""
        patience = case.timeout + 60.0
        try:
            job.wait(patience)  # type: ignore[attr-defined]
        except PipeliveError as error:
            if not job.is_over:  # type: ignore[attr-defined]
                problems.append(f"the job did not end within {patience:g} s")
            return str(error)
        return ""

    def _a_move(self, old: Placement, new: Placement) -> tuple[int, int]:
        for layer in range(old.num_layers):
            if old.stage_of(layer) != new.stage_of(layer):
                return old.stage_of(layer), new.stage_of(layer)
        raise PipeliveError("nothing moves")

    def _note_used(self, placement: Placement, held: list[Held]) -> None:
        key = (tuple(placement.counts), self.service.engine.scheduler.placement.num_stages)
        self._used.setdefault(key, tuple(stage.used_bytes for stage in held))

    def _check_living(self, trial: Trial, outcome: str, problems: list[str]) -> None:
        service, engine = self.service, self.service.engine
        held = service.await_rest()
        wanted = {ABORTED: trial.old, DONE: trial.new}.get(outcome)
        if wanted is None:
            problems.append(f"the job ended in phase {outcome}")
            return
        if engine.placement != wanted:
            problems.append(f"the placement is {engine.placement}, expected {wanted}")
        # Everything that was being served when the fault struck, and more that began after it.
        service.await_finished(8)
        progress = engine.coordinator.observe()
        epochs = {stage.epoch for stage in progress}
        if len(epochs) != 1 or epochs != {engine.scheduler.epoch}:
            problems.append(
                f"stages run epochs {sorted(epochs)}, the scheduler {engine.scheduler.epoch}"
            )
        capacities = {stage.capacity for stage in progress}
        if len(capacities) != 1:
            problems.append(f"the stages' capacities differ: {sorted(capacities)}")
        held = service.held()
        key = (tuple(wanted.counts), wanted.num_stages)
        used = tuple(stage.used_bytes for stage in held)
        if used != self._used.setdefault(key, used):
            problems.append(f"bytes in use are {used}, at {wanted} they were {self._used[key]}")
        for rank, stage in enumerate(held):
            first = self._first[rank]
            more = {
                kind: f"{first.fds.get(kind, 0)} to {count}"
                for kind, count in stage.fds.items()
                if count > first.fds.get(kind, 0)
            }
            threads = max(0, len(stage.threads) - len(first.threads))
            allowed = sum(first.fds.values()) + LAZY_DESCRIPTORS * (threads + 1)
            if sum(stage.fds.values()) > allowed:
                problems.append(f"stage {rank} holds more descriptors than at first: {more}")

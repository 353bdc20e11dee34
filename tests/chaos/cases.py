"""The faults: what is done to the service in a phase, and how that may end."""

from __future__ import annotations

import os
import random
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from pipelive_kv.coordinator import Job
from pipelive_kv.errors import PipeliveError
from pipelive_kv.placement import Placement

from .agent import Command
from .proxy import WireFault
from .service import Service

BEFORE = ("admitted", "staging", "patching", "armed")
AFTER = ("switching", "releasing")
ANY = (*BEFORE, *AFTER)

ABORTED = "aborted"
DONE = "done"
ENDED = "service ended"


@dataclass
class Trial:
    """One reconfiguration under one fault.

    Attributes:
        source, target: ranks of one of its moves; ``bystander``: a rank without one, or None.
        pause: seconds of a fault that is over before a deadline.
    """

    service: Service
    dice: random.Random
    old: Placement
    new: Placement
    source: int
    target: int
    bystander: int | None
    job: Job | None = None
    pause: float = 0.3
    undo: list[Callable[[], None]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def rank(self, role: str) -> int:
        """The rank that plays ``role``; the target where there is no bystander."""
        found = {"source": self.source, "target": self.target, "bystander": self.bystander}[role]
        return self.target if found is None else found


Strike = Callable[[Trial], None]


@dataclass(frozen=True)
class Case:
    """A fault.

    Attributes:
        name: in the table.
        phases: in which it is tried.
        strike: does it; called when the phase is entered, in the job's thread.
        outcomes: how it may end, by phase.
        timeout: seconds that the reconfiguration is given.
        options: of the reconfiguration.
        transport: where it needs one.
        recover: whether something is left for the coordinator to end before the end check.
        says: the error has to contain one of these, where it was aborted or the service ended.
    """

    name: str
    phases: tuple[str, ...]
    strike: Strike
    outcomes: dict[str, tuple[str, ...]]
    timeout: float = 60.0
    options: dict[str, Any] = field(default_factory=dict)
    transport: str = ""
    recover: bool = False
    says: tuple[str, ...] = ()


def _may(before: tuple[str, ...], after: tuple[str, ...] = (DONE,)) -> dict[str, tuple[str, ...]]:
    return dict.fromkeys(BEFORE, before) | dict.fromkeys(AFTER, after)


# -- what is done ----------------------------------------------------------------------------------


def _nothing(_: Trial) -> None:
    """No fault: what the others are compared with."""


def _cancel(trial: Trial) -> None:
    if trial.job is not None:
        trial.job.cancel()
        trial.job.cancel()


def _ask_again(trial: Trial) -> None:
    try:
        trial.service.engine.reconfigure(trial.new)
    except PipeliveError as error:
        if type(error).__name__ == "BusyError":
            return
    trial.problems.append("a second reconfiguration was begun while one was under way")


def _burst(trial: Trial) -> None:
    trial.service.burst(8)


def _wire(kind: str, *, forward: bool = True, long: bool = False) -> Strike:
    def strike(trial: Trial) -> None:
        dice = trial.dice
        fault = WireFault(
            kind,
            forward=forward,
            # Acknowledgements are few and short; data begins with a handshake.
            after=dice.choice([0, 1, dice.randrange(700), dice.randrange(60_000)])
            if forward
            else dice.randrange(200),
            size=dice.choice([1, 7, 64, 4096]) if kind != "drip" else 512,
            seconds=(30.0 if long else trial.pause) if kind == "delay" else 0.001,
            seed=dice.randrange(1 << 30),
        )
        trial.service.tell(trial.source, Command("wire", wire=fault))

    return strike


def _device(call: str, role: str) -> Strike:
    def strike(trial: Trial) -> None:
        nth = trial.dice.choice([1, 1, 2, 3])
        trial.service.tell(trial.rank(role), Command("device", call=call, nth=nth))

    return strike


def _hook(name: str, role: str) -> Strike:
    def strike(trial: Trial) -> None:
        trial.service.tell(trial.rank(role), Command("hook", hook=name))

    return strike


def _signal(role: str, *, long: bool) -> Strike:
    """Stop a stage; it goes on by itself after a while, or when the others have given up."""

    def strike(trial: Trial) -> None:
        pid = trial.service.pids[trial.rank(role)]
        os.kill(pid, signal.SIGSTOP)
        go_on = threading.Timer(6.0 if long else trial.pause, os.kill, (pid, signal.SIGCONT))
        go_on.start()

        def undo() -> None:
            go_on.join()

        trial.undo.append(undo)

    return strike


def _kill(role: str) -> Strike:
    def strike(trial: Trial) -> None:
        os.kill(trial.service.pids[trial.rank(role)], signal.SIGKILL)

    return strike


# -- the table -------------------------------------------------------------------------------------

_EITHER = (ABORTED, DONE)
_TCP_PHASES = ("staging", "patching", "armed", "switching")

CASES = (
    Case("no fault", ("admitted",), _nothing, _may((DONE,))),
    Case("cancel, twice", ANY, _cancel, _may((ABORTED,)), says=("cancelled",)),
    Case("a second reconfiguration is asked for", ANY, _ask_again, _may((DONE,))),
    Case("a burst of requests", ANY, _burst, _may((DONE,))),
    Case("dry run", ("admitted",), _nothing, _may((ABORTED,)), options={"dry_run": True}),
    *(
        Case(f"wire: {name}", _TCP_PHASES, strike, _may(_EITHER), transport="tcp", timeout=20.0)
        for name, strike in (
            ("closed", _wire("close")),
            ("reset", _wire("reset")),
            ("data direction ends", _wire("half_close")),
            ("answers end", _wire("half_close", forward=False)),
            ("bytes missing", _wire("drop")),
            ("bytes twice", _wire("duplicate")),
            ("bytes from nowhere", _wire("garbage")),
            ("a bit flipped", _wire("flip")),
            ("a bit flipped in answers", _wire("flip", forward=False)),
            ("late", _wire("delay")),
            ("drips", _wire("drip")),
        )
    ),
    *(
        Case(
            f"wire: {name}",
            ("staging", "patching", "armed"),
            strike,
            _may(_EITHER),
            transport="tcp",
            timeout=4.0,
        )
        for name, strike in (
            ("silent for good", _wire("swallow")),
            ("answers silent for good", _wire("swallow", forward=False)),
            ("later than the deadline", _wire("delay", long=True)),
        )
    ),
    *(
        Case(f"memory: {call} fails at the {role}", ("admitted", "staging"), strike, _may(_EITHER))
        for call in ("create_pages", "map")
        for role in ("target",)
        for strike in (_device(call, role),)
    ),
    Case("hook: prepare raises", ("staging",), _hook("prepare", "target"), _may((ABORTED,))),
    Case(
        "hook: warmup raises", ("staging", "patching"), _hook("warmup", "source"), _may((ABORTED,))
    ),
    Case(
        "hook: retire raises",
        ("switching",),
        _hook("retire", "source"),
        _may((DONE,)),
        recover=True,
    ),
    *(
        Case(f"{role} stopped for a moment", ANY, _signal(role, long=False), _may((DONE,)))
        for role in ("source", "target", "bystander")
    ),
    *(
        Case(
            f"{role} stopped past the deadline",
            BEFORE,
            _signal(role, long=True),
            _may(_EITHER),
            timeout=3.0,
        )
        for role in ("source", "target", "bystander")
    ),
    *(
        Case(f"{role} killed", ANY, _kill(role), _may((ENDED,), (ENDED,)), says=("stage",))
        for role in ("source", "target", "bystander")
    ),
)

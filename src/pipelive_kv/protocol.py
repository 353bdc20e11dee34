"""The protocol, written down once: states, messages, and which outcome must be on record for what.

Three machines take part: the coordinator's job, the session of each stage, and the scheduler. They
move along the tables below and no other way, and refuse what the tables do not allow in the state
they are in. docs/protocol.md shows the same tables and explains them; a test compares the two, and
another one walks through every order, loss and crash that they permit.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from enum import Enum
from typing import Generic, Literal, TypeVar

from pipelive_kv.errors import ProtocolError
from pipelive_kv.messages import Request, Settle

Outcome = Literal["commit", "abort"]


class Phase(str, Enum):
    """Where a reconfiguration stands; see docs/protocol.md."""

    PLANNED = "planned"
    ADMITTED = "admitted"
    STAGING = "staging"
    PATCHING = "patching"
    WRITE_THROUGH = "write_through"
    ARMED = "armed"
    SWITCHING = "switching"
    RELEASING = "releasing"
    DONE = "done"
    ABORTING = "aborting"
    ABORTED = "aborted"
    RECOVERING = "recovering"
    """A new coordinator has found what one before it left."""

    @property
    def is_final(self) -> bool:
        """Whether nothing more happens."""
        return self in (Phase.DONE, Phase.ABORTED)


class StageState(str, Enum):
    """Where a stage's share of a reconfiguration stands."""

    IDLE = "idle"
    PREPARED = "prepared"
    CONNECTED = "connected"
    COPYING = "copying"
    WRITING = "writing"
    ARMED = "armed"
    COMMITTED = "committed"
    SWITCHED = "switched"
    ABORTING = "aborting"


class SchedulerState(str, Enum):
    """What the scheduler has promised."""

    SERVING = "serving"
    HELD = "held"
    PROPOSED = "proposed"
    COMMITTED = "committed"


class Age(str, Enum):
    """How the epoch of a message stands to what its receiver knows."""

    NONE = "-"
    """The message names no epoch."""
    NEW = "new"
    """Above every epoch that the receiver runs or has given up."""
    SESSION = "session"
    """The one that the receiver takes part in."""
    RUNNING = "running"
    """The one whose placement it runs, which it has already left behind as a session."""
    OLD = "old"
    """Any other."""


STAMP = "stamp"
"""The engine: a stage begins, or the scheduler stamps, a step of the placement that is served."""
STAMP_K = "stamp k"
"""The engine: the same for the first step of the epoch."""
DISCARDED = "discarded"
"""A stage has taken back all that it did for an epoch."""
HELD_TOO_LONG = "held too long"
"""Nobody ended a hold before its deadline."""
RECORD_COMMIT = "record: commit"
"""The scheduler was told nothing, asked the record, and found the epoch committed."""
RECORD_ABORT = "record: abort"
"""The same, and the epoch is given up: the asking made it so where nothing was recorded."""

S = TypeVar("S", bound=Enum)


@dataclass(frozen=True)
class Rule(Generic[S]):
    """In ``state``, ``event`` with an epoch of ``age`` is allowed and leads to ``then``."""

    state: S
    event: str
    age: Age
    then: S
    note: str = ""


class Machine(Generic[S]):
    """A table of rules; what no rule allows is refused."""

    def __init__(self, name: str, start: S, rules: Iterable[Rule[S]]) -> None:
        self.name = name
        self.start = start
        self.rules = tuple(rules)
        self._by_key = {(rule.state, rule.event, rule.age): rule for rule in self.rules}
        if len(self._by_key) != len(self.rules):
            raise ValueError(f"the table of {name} has two rules for one event")

    def rule(self, state: S, event: str, age: Age) -> Rule[S] | None:
        """The rule for that event, None where it is refused."""
        return self._by_key.get((state, event, age))

    def next(self, state: S, event: str, age: Age, who: str = "") -> S:
        """The state that ``event`` leads to.

        Raises:
            ProtocolError: the table does not allow it; state, event and what is allowed are named.
        """
        rule = self.rule(state, event, age)
        if rule is None:
            epoch = "" if age is Age.NONE else f" of {_AGE_WORDS[age]} epoch"
            allowed = sorted({r.event for r in self.rules if r.state is state and r.note != "any"})
            raise ProtocolError(
                f"{who or self.name} does not take {event}{epoch} in state {state.value}, expected "
                f"{', '.join(allowed) or 'nothing'}"
            )
        return rule.then

    def changed(
        self, *, without: Iterable[Rule[S]] = (), extra: Iterable[Rule[S]] = ()
    ) -> Machine[S]:
        """Another table; for tests that show what each rule is good for."""
        gone = set(without)
        return Machine(self.name, self.start, [r for r in self.rules if r not in gone] + [*extra])


_AGE_WORDS = {
    Age.NONE: "no",
    Age.NEW: "a new",
    Age.SESSION: "its session's",
    Age.RUNNING: "the running",
    Age.OLD: "an old",
}


def event_of(request: Request) -> str:
    """The name under which the tables know ``request``."""
    if isinstance(request, Settle):
        return "Settle(commit)" if request.commit else "Settle(abort)"
    return type(request).__name__


def age_of(epoch: int | None, *, session: int | None, running: int, given_up: int) -> Age:
    """How ``epoch`` stands to a receiver that takes part in ``session`` and runs ``running``."""
    if epoch is None:
        return Age.NONE
    if epoch == session:
        return Age.SESSION
    if epoch == running:
        return Age.RUNNING
    newest = max(running, given_up, -1 if session is None else session)
    return Age.NEW if epoch > newest else Age.OLD


def _in(state: S, age: Age, events: Mapping[str, S], note: str = "") -> tuple[Rule[S], ...]:
    return tuple(Rule(state, event, age, then, note) for event, then in events.items())


def _stay(states: Iterable[S], age: Age, *events: str) -> tuple[Rule[S], ...]:
    return tuple(Rule(state, event, age, state, "any") for state in states for event in events)


_I, _P, _N, _C, _T, _A, _M, _W, _B = StageState

STAGE: Machine[StageState] = Machine(
    "a stage",
    _I,
    (
        *_stay(StageState, Age.NONE, "Describe", "Observe", "AwaitResize", "AwaitStep"),
        *_stay(StageState, Age.NONE, STAMP),
        *_stay(StageState, Age.OLD, "Abort"),
        *_in(_I, Age.NONE, {"Grow": _I}),
        *_in(_I, Age.NEW, {"Admit": _I, "Prepare": _P}),
        *_in(_I, Age.NEW, {"Abort": _I}, "the epoch is fenced: its Prepare is refused from now on"),
        *_in(_I, Age.RUNNING, {"Commit": _I, "AwaitSwitched": _I, "Release": _I}, "said again"),
        *_in(_P, Age.SESSION, {"LoadWeights": _P, "Connect": _N, "Abort": _B}),
        *_in(_N, Age.SESSION, {"LoadWeights": _N, "StartCopy": _C, "Abort": _B}),
        *_in(_C, Age.SESSION, {"LoadWeights": _C, "AwaitConverged": _C, "Abort": _B}),
        *_in(_C, Age.SESSION, {"WriteThrough": _T}, "each step's slots go out at its end"),
        *_in(_T, Age.SESSION, {"Abort": _B}),
        *_in(_T, Age.SESSION, {"Arm": _A}, "the vote"),
        *_in(_A, Age.SESSION, {"Abort": _B}, "the record says abort"),
        *_in(_A, Age.SESSION, {"Arm": _A}, "said again"),
        *_in(_A, Age.SESSION, {"Commit": _M}, "the record says commit"),
        *_in(_A, Age.SESSION, {STAMP_K: _W}, "the stamp is the decision"),
        *_in(_M, Age.SESSION, {"Commit": _M}, "said again"),
        *_in(_M, Age.SESSION, {"AwaitSwitched": _M, STAMP_K: _W}),
        *_in(_W, Age.SESSION, {"Commit": _W}, "said again"),
        *_in(_W, Age.SESSION, {"AwaitSwitched": _W}),
        *_in(_W, Age.SESSION, {"Release": _I}, "its layers and no other are left"),
        *_in(_B, Age.SESSION, {"Abort": _B}, "said again"),
        *_in(_B, Age.SESSION, {DISCARDED: _I}, "all is as before; the epoch is fenced"),
    ),
)
"""What a stage takes in which state of its session."""

_SERVING, _HELD, _PROPOSED, _COMMITTED = SchedulerState

SCHEDULER: Machine[SchedulerState] = Machine(
    "the scheduler",
    _SERVING,
    (
        *_stay(SchedulerState, Age.NONE, "DescribeScheduler", "ListLive"),
        *_stay(SchedulerState, Age.OLD, "Settle(abort)"),
        *_in(_SERVING, Age.NONE, {STAMP: _SERVING, "RaiseCapacity": _SERVING}),
        *_in(_SERVING, Age.NEW, {"Shrink": _SERVING, "Hold": _HELD}),
        *_in(_SERVING, Age.NEW, {"Throttle": _SERVING}, "until the outcome"),
        *_in(_SERVING, Age.NEW, {"Propose": _PROPOSED}, "the promise not to stamp k"),
        *_in(_SERVING, Age.NEW, {"Settle(abort)": _SERVING}, "the epoch is fenced"),
        *_in(_SERVING, Age.RUNNING, {"Settle(commit)": _SERVING}, "said again"),
        *_in(_HELD, Age.SESSION, {"Propose": _PROPOSED, "Settle(abort)": _SERVING}),
        *_in(_HELD, Age.SESSION, {HELD_TOO_LONG: _SERVING}),
        *_in(_PROPOSED, Age.NONE, {STAMP: _PROPOSED}, "below k only"),
        *_in(_PROPOSED, Age.SESSION, {"Propose": _PROPOSED}, "said again"),
        *_in(_PROPOSED, Age.SESSION, {"Settle(commit)": _COMMITTED, "Settle(abort)": _SERVING}),
        *_in(
            _PROPOSED,
            Age.SESSION,
            {RECORD_COMMIT: _COMMITTED, RECORD_ABORT: _SERVING},
            "at k without word",
        ),
        *_in(_COMMITTED, Age.NONE, {STAMP: _COMMITTED}, "below k only"),
        *_in(_COMMITTED, Age.SESSION, {"Settle(commit)": _COMMITTED}, "said again"),
        *_in(_COMMITTED, Age.SESSION, {STAMP_K: _SERVING}),
    ),
)
"""What the scheduler takes in which state; at k it stamps nothing but from COMMITTED."""


@dataclass(frozen=True)
class Ask:
    """What the coordinator asks in a phase, of everybody in ``of``, in the order of the table."""

    event: str
    of: Literal["stages", "scheduler"]
    optional: bool = False
    """Whether the phase may be left for the next one without it."""
    record: Outcome | None = None
    """What the record must say before it may be asked."""


@dataclass(frozen=True)
class Edge:
    """How a job gets from one phase to another."""

    source: Phase
    target: Phase
    record: Outcome | None = None
    """What the record must say before."""
    answered: bool = False
    """Whether everybody must have answered all that the phase has to ask."""
    lost: bool = False
    """Whether it is for the case that a participant was lost for good after the decision."""
    why: str = ""


@dataclass(frozen=True)
class JobTable:
    """What the coordinator asks in which phase, and where each phase can lead."""

    asks: Mapping[Phase, tuple[Ask, ...]]
    edges: tuple[Edge, ...]

    def edge(self, source: Phase, target: Phase, *, lost: bool = False) -> Edge | None:
        """The edge between two phases, None where there is none."""
        for edge in self.edges:
            if edge.source is source and edge.target is target and edge.lost == lost:
                return edge
        return None

    def ask(self, phase: Phase, event: str) -> Ask | None:
        """What the table says about asking ``event`` in ``phase``."""
        for ask in self.asks.get(phase, ()):
            if ask.event == event:
                return ask
        return None

    def changed(
        self,
        *,
        asks: Mapping[Phase, tuple[Ask, ...]] | None = None,
        edges: Iterable[Edge] | None = None,
    ) -> JobTable:
        """Another table; for tests that show what each line is good for."""
        return replace(
            self,
            asks={**self.asks, **(asks or {})},
            edges=self.edges if edges is None else tuple(edges),
        )


_ROOM = (
    Ask("DescribeScheduler", "scheduler", optional=True),
    Ask("Grow", "stages", optional=True),
    Ask("RaiseCapacity", "scheduler", optional=True),
)

JOB = JobTable(
    asks={
        Phase.PLANNED: (Ask("Describe", "stages"), Ask("DescribeScheduler", "scheduler")),
        Phase.RECOVERING: (Ask("Describe", "stages"), Ask("DescribeScheduler", "scheduler")),
        Phase.ADMITTED: (
            Ask("Admit", "stages", optional=True),
            Ask("Shrink", "scheduler", optional=True),
            Ask("AwaitResize", "stages", optional=True),
        ),
        Phase.STAGING: (
            Ask("Prepare", "stages"),
            Ask("Hold", "scheduler", optional=True),
            Ask("AwaitStep", "stages", optional=True),
            Ask("Connect", "stages"),
            Ask("ListLive", "scheduler"),
            Ask("StartCopy", "stages"),
            Ask("LoadWeights", "stages"),
        ),
        Phase.PATCHING: (
            Ask("AwaitConverged", "stages"),
            Ask("Throttle", "scheduler", optional=True),
        ),
        Phase.WRITE_THROUGH: (Ask("WriteThrough", "stages"),),
        Phase.ARMED: (Ask("Arm", "stages"), Ask("Propose", "scheduler")),
        Phase.SWITCHING: (
            Ask("Settle(commit)", "scheduler", record="commit"),
            Ask("Commit", "stages", record="commit"),
            Ask("AwaitSwitched", "stages", record="commit"),
        ),
        Phase.RELEASING: (
            Ask("Release", "stages", record="commit"),
            *_ROOM,
        ),
        Phase.ABORTING: (
            Ask("Abort", "stages", record="abort"),
            Ask("Settle(abort)", "scheduler", record="abort"),
            *_ROOM,
        ),
    },
    edges=(
        Edge(Phase.PLANNED, Phase.ADMITTED, answered=True),
        Edge(Phase.PLANNED, Phase.ABORTED, why="refused; nothing was done"),
        Edge(Phase.ADMITTED, Phase.STAGING, answered=True),
        Edge(Phase.STAGING, Phase.PATCHING, answered=True),
        Edge(Phase.PATCHING, Phase.WRITE_THROUGH, answered=True),
        Edge(Phase.WRITE_THROUGH, Phase.ARMED, answered=True),
        Edge(Phase.ARMED, Phase.SWITCHING, record="commit", answered=True, why="decided"),
        *(
            Edge(phase, Phase.ABORTING, why="an error, a cancel or the deadline")
            for phase in (
                Phase.ADMITTED,
                Phase.STAGING,
                Phase.PATCHING,
                Phase.WRITE_THROUGH,
                Phase.ARMED,
            )
        ),
        Edge(Phase.ABORTING, Phase.ABORTED, record="abort"),
        Edge(Phase.ABORTING, Phase.SWITCHING, record="commit", why="it was decided all the same"),
        Edge(Phase.SWITCHING, Phase.RELEASING, record="commit", answered=True),
        Edge(Phase.RELEASING, Phase.DONE, record="commit", answered=True),
        *(
            Edge(phase, Phase.DONE, record="commit", lost=True, why="reported as an error")
            for phase in (Phase.SWITCHING, Phase.RELEASING)
        ),
        Edge(Phase.RECOVERING, Phase.ABORTING, why="the record is asked there"),
        Edge(Phase.RECOVERING, Phase.DONE, why="nothing was left"),
    ),
)
"""The coordinator's table. Its record is the only thing that decides."""


class Course:
    """One job on its way through :data:`JOB`: what it may ask, and which phase may follow."""

    def __init__(self, phase: Phase = Phase.PLANNED, table: JobTable = JOB) -> None:
        self.phase = phase
        self.recorded: Outcome | None = None
        self._table = table
        self._answered: set[str] = set()

    def check_ask(self, event: str) -> None:
        """Raise ProtocolError where ``event`` must not be asked now."""
        ask = self._table.ask(self.phase, event)
        if ask is None:
            raise ProtocolError(f"the coordinator must not ask {event} in phase {self.phase.value}")
        if ask.record is not None and ask.record != self.recorded:
            raise ProtocolError(
                f"the coordinator must not ask {event} before {ask.record} is on record"
            )

    def answered(self, event: str) -> None:
        """Note that everybody has answered ``event``."""
        self._answered.add(event)

    def enter(self, phase: Phase, *, lost: bool = False) -> None:
        """Go on to ``phase``; ``lost`` where a participant was lost for good.

        Raises:
            ProtocolError: the table has no such edge, somebody has not answered, or the record does
                not say what it must.
        """
        edge = self._table.edge(self.phase, phase, lost=lost)
        step = f"a job must not go from {self.phase.value} to {phase.value}"
        if edge is None:
            raise ProtocolError(step)
        if edge.record is not None and edge.record != self.recorded:
            raise ProtocolError(f"{step} before {edge.record} is on record")
        if edge.answered:
            wanted = [ask.event for ask in self._table.asks.get(self.phase, ()) if not ask.optional]
            missing = [event for event in wanted if event not in self._answered]
            if missing:
                raise ProtocolError(f"{step} before all have answered {', '.join(missing)}")
        self.phase = phase
        self._answered.clear()

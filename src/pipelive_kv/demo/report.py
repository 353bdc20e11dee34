"""The report that the demo writes; plain data, so that it becomes JSON as it is."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Gaps:
    """How inter-token gaps of one kind are spread, in milliseconds; zeros where there are none."""

    count: int = 0
    p50_ms: float = 0.0
    p99_ms: float = 0.0
    max_ms: float = 0.0


@dataclass(frozen=True)
class GapTable:
    """Inter-token gaps by what went on meanwhile.

    A gap that a switchover falls into counts there and nowhere else. Of the others, one in which a
    prompt was run counts as ``prefill``, whatever else went on.
    """

    steady: Gaps
    """No reconfiguration under way."""
    moving: Gaps
    """Layers were being copied."""
    switchover: Gaps
    """The placement changed in between."""
    noop: Gaps
    """A switchover that changes nothing was made in between."""
    prefill: Gaps
    """Steps were shared with the prompt of another request."""


@dataclass(frozen=True)
class RoundReport:
    """One round of patches of one source stage; round 0 is the bulk copy."""

    stage: int
    number: int
    through_seq: int
    dirty_slots: int
    bytes: int
    records: int
    lag_steps: int
    start_s: float
    ms: float
    busy_ms: float


@dataclass(frozen=True)
class PhaseReport:
    """When a phase began and how long it took."""

    name: str
    start_s: float
    seconds: float


@dataclass(frozen=True)
class StageSwitch:
    """What a switchover cost one stage; ``idle_ms`` is from its last old to its first new step."""

    stage: int
    activate_ms: float
    gate_ms: float
    idle_ms: float
    transport: str


@dataclass(frozen=True)
class MoveReport:
    """One reconfiguration."""

    name: str
    mode: str
    old: tuple[int, ...]
    new: tuple[int, ...]
    layers_moved: tuple[int, ...]
    epoch: int
    step: int
    start_s: float
    seconds: float
    stop_ms: float
    """Measured inside: the longest gate wait plus activation of any stage; with stop-and-copy, the
    time from the last old step's end to the first new one's start."""
    stop_predicted_ms: float
    gap: Gaps
    """The requests' gaps that the switchover fell into, without those that shared a prompt's step;
    with stop-and-copy they contain the whole stop."""
    gap_excess_p50_ms: float
    gap_excess_max_ms: float
    """Over those of no-op switchovers: the stop time as seen from outside."""
    decoding: int
    arrivals: int
    """Requests that arrived while it was under way."""
    bytes: int
    rounds: tuple[RoundReport, ...]
    phases: tuple[PhaseReport, ...]
    stages: tuple[StageSwitch, ...]
    capacity: tuple[int, int, int]
    """Resident blocks before, during and after."""
    blocks_remapped: int


@dataclass(frozen=True)
class RestartReport:
    """The stage processes were started anew with another placement; all KV was computed again."""

    old: tuple[int, ...]
    new: tuple[int, ...]
    stop_ms: float
    """The longest time that a request waited for its next token."""
    relaunch_ms: float
    """Of it: until the new processes had their weights."""
    requests: int
    tokens_recomputed: int


@dataclass(frozen=True)
class Tpot:
    """Mean milliseconds per output token, gaps with prompts of others in them left out."""

    before_ms: float
    during_ms: float
    after_ms: float


@dataclass(frozen=True)
class StageMemory:
    """What a stage's weights and KV took; ``ok`` if never more than the budget."""

    stage: int
    process: int
    budget_bytes: int
    peak_bytes: int
    ok: bool


@dataclass(frozen=True)
class RequestReport:
    """One request in the moved run and in the unmoved one."""

    request: int
    prompt_tokens: int
    new_tokens: int
    arrival_step: int
    arrived_in: str
    """The move in whose middle it arrived; empty if it was there from the start."""
    sha256_moved: str
    sha256_unmoved: str
    identical: bool
    first_difference: int
    """Index of the first token that differs, -1 if none does."""
    text: str


@dataclass(frozen=True)
class RunReport:
    """One run of the engine."""

    seconds: float
    steps: int
    tokens: int
    tokens_per_second: float
    processes: tuple[int, ...]
    gaps: GapTable


@dataclass
class DemoReport:
    """Everything that one run of the demo has found out; times are relative to the moved run."""

    version: str
    model: str
    dtype: str
    transport: str
    corrupted: bool
    cores: int
    placements: tuple[tuple[int, ...], tuple[int, ...]]
    moved: RunReport
    unmoved: RunReport
    moves: tuple[MoveReport, ...]
    noops: tuple[MoveReport, ...]
    stop_and_copy: MoveReport
    restart: RestartReport
    tpot: Tpot
    memory: tuple[StageMemory, ...]
    requests: tuple[RequestReport, ...]
    tokens_identical: int
    seconds: float = 0.0
    warnings: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether every token of every request is the same with and without moves."""
        return self.tokens_identical == len(self.requests)

    @property
    def verdict(self) -> str:
        """The line that says it."""
        return f"tokens identical: {self.tokens_identical}/{len(self.requests)}"

"""What a reconfiguration was and what it cost."""

from __future__ import annotations

from dataclasses import dataclass, field

from pipelive_kv.messages import Converged, RoundRecord, Switched
from pipelive_kv.placement import Move, Placement
from pipelive_kv.plan import Shortage
from pipelive_kv.protocol import Phase


@dataclass(frozen=True)
class PhaseSpan:
    """When a phase ran, on the host's monotonic clock."""

    phase: Phase
    start_ns: int
    end_ns: int


@dataclass(frozen=True)
class PredictedStop:
    """The parts of a predicted stop time, in seconds."""

    fixed_s: float
    """One message there, its acknowledgement back, and the switch."""
    bytes_s: float
    """The pending bytes, or in write-through those of one step, at the bandwidth of the rounds."""
    records_s: float
    """What the pending records cost beyond their bytes."""

    @property
    def total_s(self) -> float:
        """All of it."""
        return self.fixed_s + self.bytes_s + self.records_s


@dataclass(frozen=True)
class ActualStop:
    """The parts of a stop time as measured inside, in seconds, on the stage that stopped most."""

    decision_s: float
    """The scheduler's wait at the switchover for word of the decision; 0 where it came before."""
    activate_s: float
    """The engine's own switch."""
    gate_s: float
    """Waits for the KV of gained layers, over all steps that had to."""
    in_flight_s: float = 0.0
    """Of the gate: until a source had run the steps that were waited for; no transfer's fault."""

    @property
    def transfer_s(self) -> float:
        """Of the gate: from the end of the last step waited for until its writes were there."""
        return self.gate_s - self.in_flight_s

    @property
    def total_s(self) -> float:
        """All of it."""
        return self.decision_s + self.activate_s + self.gate_s


@dataclass
class Report:
    """Filled while a reconfiguration runs; complete when its job is done."""

    epoch: int
    old: Placement
    new: Placement
    moves: tuple[Move, ...]
    phases: list[PhaseSpan] = field(default_factory=list)
    step: int = -1
    """The switchover: the first step of the new placement."""
    capacity_before: int = 0
    capacity_during: int = 0
    capacity_after: int = 0
    blocks_moved: int = 0
    """Live blocks that were copied to lower ids so that the capacity could shrink."""
    stages: tuple[Switched, ...] = ()
    converged: tuple[Converged, ...] = ()
    """What each stage predicted when it converged; zeros where a stage is no source."""
    decision_wait_s: float = 0.0
    throttle: float = 1.0
    """The smallest share of its tokens that the engine was asked to keep to."""
    dry_run: bool = False
    reason: str = ""
    """Why it was aborted."""
    path: tuple[Placement, ...] = ()
    """The placements that it goes by, the wished for one the last: one, or one for each wave."""
    waves: list[Report] = field(default_factory=list)
    """Where there are several waves: one report for each that was begun, in their order."""
    shortages: tuple[Shortage, ...] = ()
    """Where it was refused for want of memory: which stages lack how much."""
    would_fit: tuple[Placement, ...] = ()
    """With them: placements near to the wished for one to which it could go."""

    @property
    def placement(self) -> Placement:
        """The placement that the outcome leaves: of an aborted wave, where the one before led."""
        if not self.waves:
            return self.new if self.step >= 0 else self.old
        return self.waves[-1].placement

    def absorb(self, wave: Report) -> None:
        """Add up what a wave was and cost."""
        self.epoch = wave.epoch
        self.phases += wave.phases
        self.step = wave.step if wave.new == self.new else -1
        self.capacity_during = min(self.capacity_during, wave.capacity_during)
        self.capacity_after = wave.capacity_after
        self.blocks_moved += wave.blocks_moved
        self.stages += wave.stages
        self.converged += wave.converged
        self.decision_wait_s += wave.decision_wait_s
        self.throttle = min(self.throttle, wave.throttle)
        self.reason = wave.reason

    @property
    def stop_s(self) -> float:
        """The stop time measured inside: the longest gate wait plus activation of any stage."""
        return max((s.activate_s + s.gate_s for s in self.stages), default=0.0)

    @property
    def predicted_stop_s(self) -> float:
        """The longest stop time that a source predicted, last before the switchover."""
        return max((s.predicted_stop_ms for s in self.stages), default=0.0) / 1e3

    @property
    def predicted_stop(self) -> PredictedStop:
        """The longest prediction of any source, in its parts."""
        last = [stage.predicted for stage in self.stages if stage.predicted is not None]
        longest = max(
            last or self.converged,
            key=lambda found: found.predicted_stop_ms,
            default=Converged(0.0, 0, 0),
        )
        return PredictedStop(
            longest.fixed_ms / 1e3, longest.bytes_ms / 1e3, longest.records_ms / 1e3
        )

    @property
    def actual_stop(self) -> ActualStop:
        """The stop time as it was, in its parts; :attr:`stop_s` is it without the decision."""
        if not self.stages:
            return ActualStop(self.decision_wait_s, 0.0, 0.0)
        worst = max(self.stages, key=lambda stage: stage.activate_s + stage.gate_s)
        sources = {move.source for move in self.moves if move.target == worst.rank}
        tail = max((s.tail_s for s in self.stages if s.rank in sources), default=0.0)
        in_flight = max(0.0, worst.gate_s - tail)
        return ActualStop(self.decision_wait_s, worst.activate_s, worst.gate_s, in_flight)

    @property
    def rounds(self) -> tuple[RoundRecord, ...]:
        """All rounds of all sources in the order of their start; number 0 is a bulk copy."""
        found = [record for stage in self.stages for record in stage.rounds]
        return tuple(sorted(found, key=lambda record: record.start_ns))

    @property
    def bytes_moved(self) -> int:
        """Bytes of KV that crossed between stages, patches included."""
        return sum(record.bytes for record in self.rounds)

    @property
    def seconds(self) -> float:
        """From the first phase to the end of the last."""
        if not self.phases:
            return 0.0
        return (self.phases[-1].end_ns - self.phases[0].start_ns) * 1e-9

"""What a reconfiguration was and what it cost."""

from __future__ import annotations

from dataclasses import dataclass, field

from pipelive_kv.messages import RoundRecord, Switched
from pipelive_kv.placement import Move, Placement
from pipelive_kv.protocol import Phase


@dataclass(frozen=True)
class PhaseSpan:
    """When a phase ran, on the host's monotonic clock."""

    phase: Phase
    start_ns: int
    end_ns: int


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
    reason: str = ""
    """Why it was aborted."""

    @property
    def stop_s(self) -> float:
        """The stop time measured inside: the longest gate wait plus activation of any stage."""
        return max((s.activate_s + s.gate_s for s in self.stages), default=0.0)

    @property
    def predicted_stop_s(self) -> float:
        """The longest stop time that a source predicted when it converged."""
        return max((s.predicted_stop_ms for s in self.stages), default=0.0) / 1e3

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

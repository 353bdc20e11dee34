"""What a caller may choose about a reconfiguration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pipelive_kv.errors import InvalidArgumentError

Mode = Literal["live", "stop_and_copy"]
WeightsFrom = Literal["source", "peer"]


@dataclass(frozen=True)
class MigrationOptions:
    """How a reconfiguration is carried out.

    Attributes:
        mode: ``live`` copies while steps go on; ``stop_and_copy`` holds the engine while it copies
            the KV (weights are loaded before), and is there to compare with.
        weights_from: ``source`` loads the weights of gained layers from the stage's own
            WeightSource, ``peer`` takes them from the stage that runs the layers.
        max_stop_ms: the switchover is made once the predicted stop time is at most this.
        max_rounds: give up where that takes more rounds of patches.
        max_seconds: give up where the rounds take longer; 0 for the deadline of the whole.
        min_throttle: where two rounds in a row bring no gain, the engine is asked to keep to half
            of its tokens per step, then to a quarter, down to this share; 1 never asks. See
            Scheduler.throttle.
        rate_limit: bytes of KV per second while tokens are generated, 0 for no limit.
        verify: compare checksums of all moved slots before the gained layers run; this lengthens
            the stop time by the time it takes to read them.
        margin: the switchover is this many steps ahead when it is decided, so that the record is
            written while steps go on.
        keep_capacity: do not raise the capacity after the switchover above what it was before.
        waves: ``auto`` makes several smaller reconfigurations of one whose union of layers does not
            fit beside the live blocks, where that is possible; ``off`` refuses it.
        pause: wait, armed, for Job.proceed before the (first) switchover is decided; patches go on.
        lease_steps: for so many steps after the switchover, stages keep the layers that they gave
            away, and what is written flows back to them, so that Coordinator.reconfigure with the
            old placement takes it up again at once; see Job.lease. The capacity stays as low as
            during the move meanwhile. 0 for no lease; a move in several waves has none.
        dry_run: do everything but the switchover, and take it back. The job ends as aborted, its
            report is complete up to the vote, and waiting for it raises nothing.
    """

    mode: Mode = "live"
    weights_from: WeightsFrom = "source"
    max_stop_ms: float = 10.0
    max_rounds: int = 100
    max_seconds: float = 0.0
    min_throttle: float = 0.125
    rate_limit: float = 0.0
    verify: bool = False
    margin: int = 2
    keep_capacity: bool = False
    waves: Literal["auto", "off"] = "auto"
    pause: bool = False
    lease_steps: int = 0
    dry_run: bool = False

    def __post_init__(self) -> None:
        if self.mode not in ("live", "stop_and_copy"):
            raise InvalidArgumentError(f"mode is {self.mode!r}, expected live or stop_and_copy")
        if self.weights_from not in ("source", "peer"):
            raise InvalidArgumentError(
                f"weights_from is {self.weights_from!r}, expected source or peer"
            )
        if self.waves not in ("auto", "off"):
            raise InvalidArgumentError(f"waves is {self.waves!r}, expected auto or off")
        if not self.max_stop_ms > 0:
            raise InvalidArgumentError(f"max_stop_ms is {self.max_stop_ms}, expected above 0")
        if self.max_rounds < 1:
            raise InvalidArgumentError(f"max_rounds is {self.max_rounds}, expected 1 or more")
        if self.max_seconds < 0:
            raise InvalidArgumentError(f"max_seconds is {self.max_seconds}, expected 0 or more")
        if not 0 < self.min_throttle <= 1:
            raise InvalidArgumentError(
                f"min_throttle is {self.min_throttle}, expected above 0, up to 1"
            )
        if self.rate_limit < 0:
            raise InvalidArgumentError(f"rate_limit is {self.rate_limit}, expected 0 or more")
        if self.lease_steps < 0:
            raise InvalidArgumentError(f"lease_steps is {self.lease_steps}, expected 0 or more")
        if self.margin < 0:
            raise InvalidArgumentError(f"margin is {self.margin}, expected 0 or more")

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
        rate_limit: bytes of KV per second while tokens are generated, 0 for no limit.
        verify: compare checksums of all moved slots before the gained layers run; this lengthens
            the stop time by the time it takes to read them.
        margin: the switchover is this many steps ahead when it is decided, so that the record is
            written while steps go on.
        keep_capacity: do not raise the capacity after the switchover above what it was before.
    """

    mode: Mode = "live"
    weights_from: WeightsFrom = "source"
    max_stop_ms: float = 10.0
    max_rounds: int = 100
    rate_limit: float = 0.0
    verify: bool = False
    margin: int = 2
    keep_capacity: bool = False

    def __post_init__(self) -> None:
        if self.mode not in ("live", "stop_and_copy"):
            raise InvalidArgumentError(f"mode is {self.mode!r}, expected live or stop_and_copy")
        if self.weights_from not in ("source", "peer"):
            raise InvalidArgumentError(
                f"weights_from is {self.weights_from!r}, expected source or peer"
            )
        if not self.max_stop_ms > 0:
            raise InvalidArgumentError(f"max_stop_ms is {self.max_stop_ms}, expected above 0")
        if self.max_rounds < 1:
            raise InvalidArgumentError(f"max_rounds is {self.max_rounds}, expected 1 or more")
        if self.rate_limit < 0:
            raise InvalidArgumentError(f"rate_limit is {self.rate_limit}, expected 0 or more")
        if self.margin < 0:
            raise InvalidArgumentError(f"margin is {self.margin}, expected 0 or more")

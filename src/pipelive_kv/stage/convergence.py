"""Whether the rounds of a move close in on the stop time that is wanted."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import msgspec

from pipelive_kv.messages import Converged
from pipelive_kv.migration import StopPredictor

_GAIN = 0.9
"""A round brings a gain where it lowers the predicted stop time to this part of the lowest one."""

_ROUNDS_WITHOUT_GAIN = 2
"""So many rounds without a gain in a row, and the steps write as fast as can be sent."""


@dataclass
class Convergence:
    """What was predicted so far; its owner's lock guards it.

    Attributes:
        max_stop_ms: a predicted stop time up to this is small enough.
        reached: the prediction that was small enough, once there was one.
        predicted: the last prediction.
    """

    max_stop_ms: float = math.inf
    reached: Converged | None = None
    predicted: Converged | None = None
    _lowest_ms: float = math.inf
    _without_gain: int = 0
    _predictor: StopPredictor = field(default_factory=StopPredictor)

    def observe(self, *, bytes: int, records: int, seconds: float) -> None:
        """Learn from a round how long sending takes."""
        self._predictor.observe(bytes=bytes, records=records, seconds=seconds)

    def seconds(self, *, bytes: int, records: int) -> float:
        """How long it would take to send so much, in seconds."""
        return self._predictor.predict(bytes=bytes, records=records)

    def predict(self, *, bytes: int, records: int, rounds: int, lag_steps: int) -> Converged:
        """What it would take to send ``bytes`` in ``records`` records now, in its parts."""
        fixed = 1e3 * self.seconds(bytes=0, records=0)
        with_bytes = 1e3 * self.seconds(bytes=bytes, records=0)
        total = 1e3 * self.seconds(bytes=bytes, records=records)
        return Converged(
            predicted_stop_ms=total,
            rounds=rounds,
            lag_steps=lag_steps,
            fixed_ms=fixed,
            bytes_ms=with_bytes - fixed,
            records_ms=total - with_bytes,
        )

    def note(self, found: Converged, *, after_round: bool) -> None:
        """Take a prediction; what comes after one that was small enough changes nothing."""
        if self.reached is not None:
            return
        self.predicted = found
        stop_ms = found.predicted_stop_ms
        if stop_ms <= self.max_stop_ms:
            self.reached = found
        elif after_round:
            self._without_gain = 0 if stop_ms <= _GAIN * self._lowest_ms else self._without_gain + 1
            self._lowest_ms = min(self._lowest_ms, stop_ms)

    @property
    def is_stalled(self) -> bool:
        """Whether the last rounds brought no gain."""
        return self._without_gain >= _ROUNDS_WITHOUT_GAIN

    def begin_again(self) -> Converged | None:
        """The last prediction, marked as stalled; the next ones are compared with it alone."""
        if self.predicted is None:
            return None
        self._without_gain = 0
        self._lowest_ms = self.predicted.predicted_stop_ms
        return msgspec.structs.replace(self.predicted, stalled=True)

    def prospect(self) -> str:
        """How far it is, for an error's text."""
        if self.predicted is None:
            return "the bulk of the KV is still on its way"
        return (
            f"after {self.predicted.rounds} rounds the predicted stop time is "
            f"{self.predicted.predicted_stop_ms:.1f} ms, the limit {self.max_stop_ms:g} ms"
        )

"""A stage's share of one reconfiguration: its source side, its target side, and its clock."""

from __future__ import annotations

import time

from pipelive_kv.errors import BusyError
from pipelive_kv.messages import Switched
from pipelive_kv.placement import Placement
from pipelive_kv.stage.source import SourceSession
from pipelive_kv.stage.target import TargetSession


class StageSession:
    """What a stage keeps from the preparation of an epoch to its end."""

    def __init__(
        self,
        epoch: int,
        rank: int,
        old: Placement,
        placement: Placement,
        target: TargetSession,
        *,
        lease: bool = False,
    ) -> None:
        self.lease = lease
        self.epoch = epoch
        self.rank = rank
        self.old = old
        self.placement = placement
        self.lost = tuple(
            layer for layer in old.layers_of(rank) if layer not in set(placement.layers_of(rank))
        )
        self.target = target
        self.source: SourceSession | None = None
        self.switch_step: int | None = None
        self._last_ended = -1
        self._last_old_end_ns = 0
        self._first_new_start_ns = 0
        self._activate_s = 0.0
        self._gate_s = 0.0

    @property
    def last_ended(self) -> int:
        """The last step that the stage has completed."""
        return self._last_ended

    def step_ended(self, seq: int) -> None:
        """Tell that the stage has completed the steps up to ``seq``."""
        self._last_ended = seq
        if self.source is not None:
            self.source.sealed(seq)

    def arm(self) -> None:
        """Vote: from here on :meth:`switch` cannot fail.

        Raises:
            BusyError: the gained layers are not ready.
            PipeliveError: what went wrong with a transfer.
        """
        if self.target.layers and not self.target.loaded:
            raise BusyError(
                f"stage {self.rank} has not loaded the weights of layers {self.target.layers}"
            )
        self.target.arm()
        if self.source is not None:
            self.source.promise()

    def switch(self, step: int) -> None:
        """Called in the engine's thread before step ``step``, the first of the new placement."""
        self.switch_step = step
        self.commit(step)

    def commit(self, step: int) -> None:
        """The epoch is committed and begins with step ``step``, whenever that comes.

        A target before its source in the pipeline needs the tail before the source sees that step.
        """
        if self.source is not None:
            self.source.commit(step)

    def switched(self, last_old_end_ns: int, activation_start_ns: int) -> None:
        """Note what the activation cost, which ends now."""
        self._last_old_end_ns = last_old_end_ns
        self._first_new_start_ns = time.monotonic_ns()
        self._activate_s = (self._first_new_start_ns - activation_start_ns) * 1e-9

    def gate(self, layer: int, needs: int, timeout: float) -> None:
        """Wait until ``layer`` holds the writes, up to ``needs``, of the old placement's steps."""
        if self.switch_step is None or layer not in self.target.layers:
            return
        start = time.monotonic_ns()
        self.target.gate(layer, min(needs, self.switch_step - 1), timeout)
        self._gate_s += (time.monotonic_ns() - start) * 1e-9

    def report(self) -> Switched:
        """What the switchover cost on this stage."""
        source = self.source
        predicted = source.predicted if source is not None else None
        return Switched(
            rank=self.rank,
            step=self.switch_step if self.switch_step is not None else -1,
            last_old_end_ns=self._last_old_end_ns,
            first_new_start_ns=self._first_new_start_ns,
            activate_s=self._activate_s,
            gate_s=self._gate_s,
            predicted_stop_ms=predicted.predicted_stop_ms if predicted is not None else 0.0,
            predicted=predicted,
            rounds=source.rounds if source is not None else (),
            transport=",".join(sorted({move.transport for move in source.outgoing}))
            if source is not None
            else "",
            verified_slots=source.verified_slots if source is not None else 0,
            reconnects=source.reconnects if source is not None else 0,
            tail_s=source.tail_seconds(self._last_old_end_ns) if source is not None else 0.0,
        )

    def interrupt(self) -> None:
        """End what waits for a peer, so that :meth:`discard` does not have to wait for it."""
        if self.source is not None:
            self.source.interrupt()
        self.target.interrupt()

    def discard(self) -> None:
        """Everything as it was before the session: nothing is sent or written any more."""
        if self.source is not None:
            self.source.cancel()
        self.target.discard()

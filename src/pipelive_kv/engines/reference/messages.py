"""What driver and stages send each other, encoded as msgpack."""

from __future__ import annotations

from typing import Literal

import msgspec

from pipelive_kv.messages import Stamp

__all__ = [
    "Failed",
    "FromStage",
    "Meet",
    "Met",
    "Ready",
    "Sample",
    "Step",
    "StepDone",
    "Stop",
    "ToStage",
]


class Sample(msgspec.Struct, frozen=True, array_like=True):
    """A token to draw from one row of a step's logits."""

    row: int
    position: int
    temperature: float
    seed: int


class Step(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """One step: the same message goes to every stage.

    `kind` "empty" runs no tokens; all lists are empty then. Tokens are padded to a fixed number:
    their slot is -1, and they form sequences of length 0.
    """

    stamp: Stamp
    group: int
    """Which of the groups of processes passes the hidden states on; see :class:`Meet`."""
    kind: Literal["prefill", "decode", "empty"]
    tokens: list[int]
    positions: list[int]
    slots: list[int]
    block_tables: list[list[int]]
    seq_lens: list[int]
    query_start: list[int]
    logit_rows: list[int]
    samples: list[Sample]


class Meet(msgspec.Struct, frozen=True, tag=True):
    """Connect with the processes of `ranks`, beside the steps; answered by `Met`."""

    group: int
    ranks: list[int]


class Stop(msgspec.Struct, frozen=True, tag=True):
    """Leave the loop."""


class Ready(msgspec.Struct, frozen=True, tag=True):
    """A stage has loaded its layers."""

    rank: int


class Met(msgspec.Struct, frozen=True, tag=True):
    """A stage is connected with all others of a group, or says why it is not."""

    rank: int
    group: int
    error: str = ""


class StepDone(msgspec.Struct, frozen=True, tag=True):
    """A stage has run a step; with the last layer come tokens. Times: monotonic seconds."""

    rank: int
    seq: int
    begin: float
    start: float
    end: float
    gate: float
    num_layers: int
    tokens: list[int]


class Failed(msgspec.Struct, frozen=True, tag=True):
    """A stage raised and ends."""

    rank: int
    error: str
    trace: str


ToStage = Step | Meet | Stop
FromStage = Ready | Met | StepDone | Failed

"""A stage process without a model, for the benchmark of moves of much KV: it only writes tokens."""

from __future__ import annotations

import time
from dataclasses import dataclass
from multiprocessing.connection import Connection

import msgspec
import numpy as np

import pipelive_kv as pk


@dataclass(frozen=True)
class Shape:
    """``moving`` layers of ``blocks`` live blocks move; each stage has a layer besides."""

    moving: int
    blocks: int
    sequences: int
    kv_heads: int = 8
    head_dim: int = 128
    block_size: int = 16

    @property
    def spec(self) -> pk.KVSpec:
        """The KV of one layer."""
        return pk.KVSpec(self.kv_heads, self.head_dim, "bfloat16", self.block_size)

    @property
    def source(self) -> pk.Placement:
        """All moving layers on stage 0."""
        return pk.Placement.from_counts([1 + self.moving, 1])

    @property
    def target(self) -> pk.Placement:
        """All moving layers on stage 1."""
        return pk.Placement.from_counts([1, 1 + self.moving])

    @property
    def moving_bytes(self) -> int:
        """Live KV of the moving layers, the null block apart."""
        return self.moving * self.blocks * self.spec.block_bytes


class Times(msgspec.Struct):
    """A step on a stage, in monotonic seconds."""

    begin: float
    end: float
    gate: float


class Message(msgspec.Struct):
    """A step on its way through the stages."""

    stamp: pk.Stamp
    slots: list[int]
    times: list[Times]


def run_stage(
    rank: int,
    shape: Shape,
    control: tuple[str, bytes],
    transport: str,
    seed: int,
    inbox: Connection,
    outbox: Connection,
) -> None:
    """The process's entry point; an empty message ends it."""
    pool = pk.KVPool(
        shape.spec,
        num_layers=shape.source.num_layers,
        layers=shape.source.layers_of(rank),
        max_blocks=shape.blocks + 1,
        capacity=shape.blocks + 1,
    )
    random = np.random.default_rng(seed + rank)
    for layer in pool.layers:
        # Written once, so that every page is there before anything is timed.
        kv = pool.layer(layer).as_uint16()
        kv[:] = random.integers(0, 1 << 14, kv.shape[1:], dtype=np.uint16)
    stage = pk.Stage(
        pp_rank=rank,
        pp_size=2,
        pool=pool,
        placement=shape.source,
        control=pk.ControlEndpoint(control[0], pk.ControlKey.from_bytes(control[1])),
        transport=transport,
    )
    decoder = msgspec.msgpack.Decoder(Message)
    token = random.standard_normal((shape.sequences, shape.kv_heads, shape.head_dim), np.float32)
    try:
        while received := inbox.recv_bytes():
            message = decoder.decode(received)
            message.times.append(_step(stage, message, token))
            outbox.send_bytes(msgspec.msgpack.encode(message))
        outbox.send_bytes(b"")
    except (EOFError, BrokenPipeError):
        pass  # the driver or the other stage has gone, and says why
    finally:
        stage.close()
        pool.close()


def _step(stage: pk.Stage, message: Message, token: np.ndarray) -> Times:
    begin, waited = time.monotonic(), 0.0
    slots = np.array(message.slots, dtype=np.int64)
    value = token + np.float32(message.stamp.seq)
    step = stage.begin(message.stamp, slots)
    for layer in step.layers:
        before = time.monotonic()
        step.gate(layer)
        waited += time.monotonic() - before
        pk.append(stage.pool.layer(layer), value, value, slots)
    stage.end(step)
    return Times(begin, time.monotonic(), waited)

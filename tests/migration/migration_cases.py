"""Pools, channels and relays that the migration tests share."""

from __future__ import annotations

import os
import socket
import threading

import numpy as np

from pipelive_kv import _core
from pipelive_kv.errors import PipeliveError
from pipelive_kv.kv import KVPool
from pipelive_kv.spec import KVSpec
from pipelive_kv.transport import Channel

SECONDS = 30.0
KEY = b"0123456789abcdef0123456789abcdef"
SPEC = KVSpec(2, 8, block_size=4)
LAYERS = (1, 4)
BLOCKS = 16


def make_pool(spec=SPEC, *, capacity=BLOCKS, layers=LAYERS, **options):
    return KVPool(
        spec,
        num_layers=6,
        layers=layers,
        max_blocks=BLOCKS,
        capacity=capacity,
        budget=1 << 26,
        page_bytes=4096,
        **options,
    )


def views(pool, layers=LAYERS):
    return {layer: pool.layer(layer) for layer in layers}


def slots_of(pool, layer):
    """The layer's bits as [slot, head, 2, dim], whatever its order in memory (a view by block)."""
    bits = pool.layer(layer).as_uint16()[: pool.capacity]
    return bits.transpose(0, 3, 1, 2, 4)


def read_slot(pool, layer, slot):
    block = pool.spec.block_size
    return slots_of(pool, layer)[slot // block, slot % block].copy()


def write_slot(pool, layer, slot, value):
    block = pool.spec.block_size
    slots_of(pool, layer)[slot // block, slot % block] = value


def channels(kind="shm", ring_bytes=1 << 20):
    """Two ends of a channel, without a listener."""
    if kind == "shm":
        a, b = socket.socketpair()
        memory = _core.shm_memory(ring_bytes)
        other = os.dup(memory)
        return (
            Channel(_core.shm_channel(a.detach(), memory, 0)),
            Channel(_core.shm_channel(b.detach(), other, 1)),
        )
    with socket.create_server(("127.0.0.1", 0)) as server:
        a = socket.create_connection(server.getsockname())
        b, _ = server.accept()
    return tuple(Channel(_core.tcp_channel(s.detach(), 1 << 26, 1 << 16, 5.0)) for s in (a, b))


class Running:
    """A receiver's run in a thread of its own."""

    def __init__(self, receiver, timeout=SECONDS):
        self.receiver = receiver
        self.error: PipeliveError | None = None
        self._timeout = timeout
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self):
        try:
            self.receiver.run(self._timeout)
        except PipeliveError as error:
            self.error = error

    @property
    def alive(self):
        return self._thread.is_alive()

    def join(self):
        self._thread.join(SECONDS)
        assert not self._thread.is_alive()
        return self.error

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.receiver.cancel()
        self.join()


def ranges(*pairs):
    return np.array(pairs, dtype=np.uint64).reshape(-1, 2)


KINDS = (
    "hello",
    "data",
    "round_end",
    "ack",
    "verify_request",
    "verify_reply",
    "region",
    "region_end",
    "finish",
    "abort",
)


def kind_of(message):
    return KINDS[message[6] - 1]

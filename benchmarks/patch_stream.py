"""A stream of patches between two stage processes of the reference engine, beside its decoding.

:func:`start` goes in as ``EngineConfig.wrap_hooks``. In the first and in the last stage it starts a
thread, and one streams memory of its own to the other, with the sender and receiver that moves use.
:class:`Remote` is the driver's end: it sets the cap and asks how much has gone over.
"""

from __future__ import annotations

import contextlib
import functools
import json
import secrets
import tempfile
import threading
from multiprocessing.connection import Client, Connection, Listener

import numpy as np

import pipelive_kv as pk
from pipelive_kv.engines.reference import WrapHooks
from pipelive_kv.migration import PatchReceiver, PatchSender
from pipelive_kv.transport import PatchListener, connect

SPEC = pk.KVSpec(8, 128, "bfloat16", 16)
BLOCKS = 128
"""Of one layer: 8 MiB, which is one round."""

DAY = 86400.0


def start(
    address: str, key: bytes, transport: str, hooks: pk.EngineHooks, pool: pk.KVPool
) -> pk.EngineHooks:
    """Start the thread of a stage that has a part in it; the engine's hooks stay as they are."""
    ends = {0: _send, pool.num_layers - 1: _receive}
    for layer, work in ends.items():
        if layer in pool.layers:
            arguments = (address, key, transport)
            threading.Thread(target=work, args=arguments, daemon=True).start()
    return hooks


def _memory() -> pk.KVPool:
    pool = pk.KVPool(SPEC, num_layers=1, layers=[0], max_blocks=BLOCKS, capacity=BLOCKS)
    pool.layer(0).as_uint16()[:] = 1
    return pool


def _receive(address: str, key: bytes, transport: str) -> None:
    with _memory() as pool, PatchListener(transport, key=key) as listener:
        with Client(address, authkey=key) as driver:
            driver.send_bytes(json.dumps({"target": listener.address}).encode())
        # The source does not finish, it goes.
        with listener.accept(DAY) as channel, contextlib.suppress(pk.ClosedError):
            PatchReceiver(channel, SPEC, {0: pool.layer(0)}, epoch=1).run(DAY)


def _send(address: str, key: bytes, transport: str) -> None:
    with _memory() as pool, Client(address, authkey=key) as driver:
        driver.send_bytes(json.dumps({"source": transport}).encode())
        channel = connect(driver.recv_bytes().decode(), key=key, timeout=60)
        sender = PatchSender(channel, SPEC, {0: pool.layer(0)}, epoch=1)
        stream = _Stream(sender)
        try:
            while word := driver.recv_bytes():
                stream.set_cap(json.loads(word))
                driver.send_bytes(str(stream.bytes).encode())
        except EOFError:
            pass  # the driver has gone
        stream.end()
        sender.cancel()


class _Stream:
    """Sends the same round for ever; a cap of 0 pauses it, None lifts the cap."""

    def __init__(self, sender: PatchSender) -> None:
        self.bytes = 0
        self._sender = sender
        self._cap: float | None = 0.0
        self._ended = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def set_cap(self, cap: float | None) -> None:
        with self._changed:
            self._cap = cap
            if cap != 0:
                self._sender.set_rate_limit(cap)
            self._changed.notify_all()

    def end(self) -> None:
        with self._changed:
            self._ended = True
            self._cap = None
            self._changed.notify_all()
        self._sender.set_rate_limit(None)
        self._thread.join(10)

    def _run(self) -> None:
        ranges = np.array([[0, BLOCKS * SPEC.block_size]], dtype=np.uint64)
        number = 0
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._cap != 0 or self._ended)
                if self._ended:
                    return
            self.bytes += self._sender.send_round(number, number, ranges, timeout=600).bytes
            self._sender.wait_applied(number, 600)
            number += 1


class Remote:
    """The driver's end. :attr:`wrap_hooks` goes into the engine's configuration."""

    def __init__(self, transport: str = "auto") -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="pipelive-bench-")
        key = secrets.token_bytes(32)
        self._listener = Listener(f"{self._folder.name}/stream", "AF_UNIX", authkey=key)
        self.wrap_hooks: WrapHooks = functools.partial(
            start, self._listener.address, key, transport
        )
        self._source: Connection | None = None

    def connect(self) -> None:
        """Once the engine is up: bring the two ends together."""
        target = ""
        while not (self._source and target):
            peer = self._listener.accept()
            said = json.loads(peer.recv_bytes())
            if "source" in said:
                self._source = peer
            else:
                target = said["target"]
                peer.close()
        self._source.send_bytes(target.encode())

    def cap(self, bytes_per_second: float | None) -> int:
        """Set the cap (0 pauses, None lifts it); the bytes sent so far."""
        if self._source is None:
            raise RuntimeError("connect() comes first")
        self._source.send_bytes(json.dumps(bytes_per_second).encode())
        return int(self._source.recv_bytes())

    def close(self) -> None:
        """End the stream."""
        if self._source is not None:
            self._source.close()
        self._listener.close()
        self._folder.cleanup()

"""Connections that are lost after the vote, at a moment when nobody looks at them."""

from __future__ import annotations

import contextlib
import threading
import time

import numpy as np
import pytest

import pipelive_kv as pk
from pipelive_kv.migration import PatchReceiver, PatchSender
from pipelive_kv.stage import patch_thread
from pipelive_kv.stage.background import Background
from pipelive_kv.stage.incoming import Incoming
from pipelive_kv.stage.outgoing import Outgoing
from pipelive_kv.stage.source import SourceSession
from pipelive_kv.transport import PatchListener, connect
from pipelive_kv.transport.address import Address

from .proxy import FaultProxy, WireFault

KEY = b"k" * 32
EPOCH = 3
SPEC = pk.KVSpec(num_kv_heads=1, head_dim=8, dtype="float32", block_size=4)
BLOCKS = 8


class Ends:
    """One source with two targets, one layer each; the first connections go over proxies."""

    def __init__(self, cleanup: contextlib.ExitStack, background: Background) -> None:
        self.background = background
        self.pools = [self._pool((0, 1), cleanup), self._pool((0,), cleanup)]
        self.pools.append(self._pool((1,), cleanup))
        self.tracker = pk.DirtyTracker(BLOCKS * SPEC.block_size)
        self.incoming = [self._incoming(layer) for layer in (0, 1)]
        self.proxies = [
            FaultProxy(Address.parse(incoming.address).tcp) for incoming in self.incoming
        ]
        self.outgoing = [self._outgoing(layer) for layer in (0, 1)]
        for move in self.outgoing:
            move.open(10)
        self.source = SourceSession(
            EPOCH,
            self.tracker,
            self.outgoing,
            background,
            sealed=-1,
            block_size=SPEC.block_size,
            verify=False,
            ends_at=time.monotonic() + 60,
        )
        for part in (self.source, *self.incoming):
            cleanup.callback(part.cancel)
        for proxy in self.proxies:
            cleanup.callback(proxy.close)

    def write(self, step: int) -> None:
        """One step that writes one slot of both layers."""
        self.tracker.open(step)
        self.tracker.record(step, np.array([step], dtype=np.int64))
        for layer in (0, 1):
            view = np.from_dlpack(self.pools[0].layer(layer))
            view[0, :, :, step, :] = 10 * step + layer + 1
        self.tracker.seal(step)
        self.source.sealed(step)

    def held(self, layer: int) -> bytes:
        """What the target of ``layer`` holds."""
        return np.from_dlpack(self.pools[1 + layer].layer(layer)).tobytes()

    def sent(self, layer: int) -> bytes:
        """What the source holds."""
        return np.from_dlpack(self.pools[0].layer(layer)).tobytes()

    @staticmethod
    def _pool(layers: tuple[int, ...], cleanup: contextlib.ExitStack) -> pk.KVPool:
        pool = pk.KVPool(
            SPEC,
            num_layers=2,
            layers=layers,
            max_blocks=BLOCKS,
            capacity=BLOCKS,
            page_pool=pk.PagePool("1MiB", page_bytes=4096),
        )
        cleanup.callback(pool.close)
        return pool

    def _incoming(self, layer: int) -> Incoming:
        view = {layer: self.pools[1 + layer].layer(layer)}
        return Incoming(
            0,
            (layer,),
            PatchListener("tcp", key=KEY),
            lambda channel: PatchReceiver(channel, SPEC, view, epoch=EPOCH),
            self.background,
            time.monotonic() + 60,
        )

    def _outgoing(self, layer: int) -> Outgoing:
        view = {layer: self.pools[0].layer(layer)}
        addresses = [f"tcp://127.0.0.1:{self.proxies[layer].address[1]}"]

        def open_channel(timeout: float):
            where = addresses.pop() if addresses else self.incoming[layer].address
            return connect(where, key=KEY, timeout=timeout)

        def make_sender(channel):
            return PatchSender(channel, SPEC, view, epoch=EPOCH)

        return Outgoing(1 + layer, (layer,), open_channel, make_sender)


class Counting(Background):
    """Notes how often it is asked, and stops there while ``go_on`` is not set."""

    def __init__(self) -> None:
        super().__init__(5)
        self.calls = 0
        self.lock = threading.Lock()
        self.go_on = threading.Event()

    def run(self, call):
        with self.lock:
            self.calls += 1
        assert self.go_on.wait(30)
        return super().run(call)


@pytest.fixture(params=[0, 5])
def ends(request):
    with contextlib.ExitStack() as cleanup:
        yield Ends(cleanup, Background(request.param))


def test_the_bulk_alone_is_left_to_the_background():
    background = Counting()
    with contextlib.ExitStack() as cleanup:
        ends = Ends(cleanup, background)
        cleanup.callback(background.go_on.set)
        ends.source.start([(0, BLOCKS)], max_stop_ms=1000, max_rounds=100, weights=None)
        ends.write(0)
        with pytest.raises(pk.DeadlineError):
            ends.source.await_converged(0.05)
        background.go_on.set()
        ends.source.await_converged(30)
        ends.source.write_through(30)
        ends.source.commit(3)
        for step in (1, 2):
            ends.write(step)
        ends.source.await_tail(30)
        for layer, incoming in enumerate(ends.incoming):
            incoming.wait_finished(30)
            assert ends.held(layer) == ends.sent(layer)
    assert background.calls == 3  # the source, and each target


@pytest.mark.parametrize("silent", [0, 1])
def test_one_closes_while_the_other_is_waited_for(ends, silent, monkeypatch):
    """The tail's wait for a silent target ends; the other's end was never noticed until then."""
    monkeypatch.setattr(patch_thread, "STALL_TIMEOUT", 1.0)
    ends.source.start([(0, BLOCKS)], max_stop_ms=1000, max_rounds=100, weights=None)
    ends.write(0)
    ends.source.await_converged(30)
    ends.source.write_through(30)
    ends.source.promise()
    for incoming in ends.incoming:
        incoming.arm()
    ends.write(1)
    for incoming in ends.incoming:
        incoming.wait_applied(1, 30)
    ends.proxies[silent].arm(WireFault("swallow"))
    ends.source.commit(3)
    ends.write(2)
    ends.incoming[1 - silent].wait_applied(2, 30)
    other = ends.proxies[1 - silent]
    other.close()
    ends.source.await_tail(30)
    for layer, incoming in enumerate(ends.incoming):
        incoming.wait_applied(2, 30)
        incoming.wait_finished(30)
        assert ends.held(layer) == ends.sent(layer)
    assert ends.source.reconnects == 2

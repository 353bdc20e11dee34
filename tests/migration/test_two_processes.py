"""A target in a process of its own, and what happens when it or the source is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from migration_cases import KEY, LAYERS, SECONDS, make_pool, ranges, slots_of, views

from pipelive_kv.errors import ClosedError
from pipelive_kv.migration import PatchReceiver, PatchSender
from pipelive_kv.transport import PatchListener, connect

EPOCH = 2
ALL = ranges((0, 64))


class Process:
    """This file, run as a program: one line of text per word that it is asked to say."""

    def __init__(self, *arguments):
        self.popen = subprocess.Popen(
            [sys.executable, __file__, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
        )

    def line(self):
        return self.popen.stdout.readline().strip()

    def end(self):
        if self.popen.poll() is None:
            self.popen.kill()
        self.popen.wait(SECONDS)
        for stream in (self.popen.stdin, self.popen.stdout):
            stream.close()


@pytest.fixture
def start():
    started = []

    def start(*arguments):
        started.append(Process(*arguments))
        return started[-1]

    yield start
    for process in started:
        process.end()


def open_channel(address, pool, **options):
    device = pool.page_pool.device
    return connect(address, key=KEY, timeout=SECONDS, device=device, **options)


def listen(kind, pool, **options):
    return PatchListener(kind, key=KEY, device=pool.page_pool.device, **options)


def send_rounds(sender, first, last):
    for number in range(first, last):
        sender.send_round(number, number, ALL, timeout=SECONDS)


def seeded(pool):
    for layer in LAYERS:
        bits = pool.layer(layer).as_uint16()[: pool.capacity]
        bits[...] = np.random.default_rng(layer).integers(0, 1 << 16, bits.shape, dtype=np.uint16)


@pytest.mark.parametrize("kind", ["tcp", "shm", "auto", "p2p"])
def test_a_session_between_processes(start, kind):
    target = start("target", kind)
    with make_pool() as source:
        channel = open_channel(target.line(), source, hello={"epoch": EPOCH})
        assert channel.kind == ("shm" if kind == "auto" else kind)
        seeded(source)
        sender = PatchSender(channel, source.spec, views(source), epoch=EPOCH)
        send_rounds(sender, 0, 200)
        sender.wait_applied(199, SECONDS)
        assert sender.verify(ALL, SECONDS)
        sender.finish(SECONDS)
    assert target.line() == "finished 200 same"


@pytest.mark.parametrize("kind", ["tcp", "shm", "p2p"])
def test_a_target_killed_mid_round(start, kind):
    target = start("target", kind)
    with make_pool() as source:
        channel = open_channel(target.line(), source)
        sender = PatchSender(channel, source.spec, views(source), epoch=EPOCH)
        send_rounds(sender, 0, 20)
        sender.wait_applied(19, SECONDS)
        target.popen.send_signal(signal.SIGSTOP)
        target.popen.kill()
        begin = time.monotonic()
        with pytest.raises(ClosedError):
            send_rounds(sender, 20, 100000)
        assert time.monotonic() - begin < SECONDS


@pytest.mark.parametrize("kind", ["tcp", "shm", "p2p"])
def test_a_source_killed_mid_round(start, kind):
    with make_pool() as pool, listen(kind, pool) as listener:
        source = start("source", listener.address)
        receiver = PatchReceiver(listener.accept(SECONDS), pool.spec, views(pool), epoch=EPOCH)
        assert source.line() == "sending"

        def kill():
            receiver.wait_applied(5, SECONDS)
            source.popen.kill()

        killer = threading.Thread(target=kill)
        killer.start()
        begin = time.monotonic()
        with pytest.raises(ClosedError):
            receiver.run(SECONDS)
        assert time.monotonic() - begin < SECONDS
        killer.join()
        with pytest.raises(ClosedError):
            receiver.wait_applied(10**9, SECONDS)


@pytest.mark.parametrize("kind", ["tcp", "shm", "p2p"])
def test_a_source_that_wakes_after_the_target_gave_up_writes_nothing(start, kind):
    with make_pool() as pool, listen(kind, pool) as listener:
        source = start("source", listener.address)
        receiver = PatchReceiver(listener.accept(SECONDS), pool.spec, views(pool), epoch=EPOCH)
        assert source.line() == "sending"

        def stop():
            receiver.wait_applied(5, SECONDS)
            source.popen.send_signal(signal.SIGSTOP)
            receiver.cancel()

        stopper = threading.Thread(target=stop)
        stopper.start()
        with pytest.raises(Exception, match="cancelled"):
            receiver.run(SECONDS)
        stopper.join()
        for layer in LAYERS:
            pool.layer(layer).as_uint16()[...] = 0x5A5A
        source.popen.send_signal(signal.SIGCONT)
        assert source.line() == "ClosedError"  # it has woken, gone on, and been told
        assert all((slots_of(pool, layer) == 0x5A5A).all() for layer in LAYERS)


def main_target(kind):
    with make_pool() as pool, make_pool() as expected:
        seeded(expected)
        with listen(kind, pool, hello={"epoch": EPOCH}) as listener:
            print(listener.address, flush=True)
            channel = listener.accept(SECONDS)
        receiver = PatchReceiver(channel, pool.spec, views(pool), epoch=EPOCH)
        receiver.run(SECONDS)
        same = all((slots_of(pool, layer) == slots_of(expected, layer)).all() for layer in LAYERS)
        print("finished", receiver.stats().rounds, "same" if same else "different", flush=True)


def main_source(address):
    with make_pool() as pool:
        channel = open_channel(address, pool)
        sender = PatchSender(channel, pool.spec, views(pool), epoch=EPOCH)
        print("sending", flush=True)
        try:
            send_rounds(sender, 0, 10**7)
        except Exception as error:
            print(type(error).__name__, flush=True)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    {"target": main_target, "source": main_source}[sys.argv[1]](*sys.argv[2:])

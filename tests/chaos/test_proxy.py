"""The fault proxy does to a connection what it is told, and nothing else."""

from __future__ import annotations

import socket

import pytest

from .proxy import FaultProxy, WireFault

DATA = bytes(range(256)) * 40


@pytest.fixture
def relayed():
    """Give (sender, receiver, proxy)."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        proxy = FaultProxy(server.getsockname()[:2])
        sender = socket.create_connection(proxy.address)
        receiver, _ = server.accept()
    for end in (sender, receiver):
        end.settimeout(30)
    yield sender, receiver, proxy
    sender.close()
    receiver.close()
    proxy.close()
    assert proxy.is_over


def read_all(end: socket.socket) -> bytes:
    found = bytearray()
    while data := end.recv(1 << 16):
        found += data
    return bytes(found)


def read_exactly(end: socket.socket, count: int) -> bytes:
    found = bytearray()
    while len(found) < count:
        found += end.recv(count - len(found))
    return bytes(found)


@pytest.mark.parametrize(
    ("kind", "size", "wanted"),
    [
        ("drop", 7, DATA[:100] + DATA[107:]),
        ("duplicate", 7, DATA[:107] + DATA[100:]),
        ("half_close", 1, DATA[:100]),
        ("drip", 512, DATA),
        ("delay", 1, DATA),
    ],
)
def test_what_is_told_happens_once(relayed, kind, size, wanted):
    sender, receiver, proxy = relayed
    proxy.arm(WireFault(kind, after=100, size=size, seconds=0.001))
    sender.sendall(DATA)
    sender.shutdown(socket.SHUT_WR)
    assert read_all(receiver) == wanted
    assert proxy.struck


def test_one_bit_is_another(relayed):
    sender, receiver, proxy = relayed
    proxy.arm(WireFault("flip", after=100, size=64, seed=3))
    sender.sendall(DATA)
    sender.shutdown(socket.SHUT_WR)
    found = read_all(receiver)
    changed = [a ^ b for a, b in zip(found, DATA, strict=True)]
    assert sum(bits.bit_count() for bits in changed) == 1
    assert 100 <= next(i for i, bits in enumerate(changed) if bits) < 164


def test_the_other_direction_is_left_alone(relayed):
    sender, receiver, proxy = relayed
    proxy.arm(WireFault("garbage", forward=False, after=3, size=5, seed=1))
    sender.sendall(b"hello")
    assert read_exactly(receiver, 5) == b"hello"
    receiver.sendall(b"abcdef")
    found = read_exactly(sender, 11)
    assert found[:3] + found[8:] == b"abcdef"


def test_without_a_fault_nothing_is_changed(relayed):
    sender, receiver, proxy = relayed
    sender.sendall(DATA)
    sender.shutdown(socket.SHUT_WR)
    assert read_all(receiver) == DATA
    assert not proxy.struck

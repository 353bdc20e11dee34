"""Strangers and old recordings at the port that patches come to."""

from __future__ import annotations

import os
import socket
from concurrent.futures import ThreadPoolExecutor

import pytest
from ports import Recorder, await_hang_up

from pipelive_kv.errors import DeadlineError, ProtocolError
from pipelive_kv.transport import Address, PatchListener, connect, listener

KEY = b"0123456789abcdef0123456789abcdef"
SECONDS = 60


@pytest.fixture
def pool():
    with ThreadPoolExecutor(4) as pool:
        yield pool


def stranger(address):
    where = Address.parse(address)
    if where.kind == "tcp":
        return socket.create_connection(where.tcp, timeout=SECONDS)
    connected = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connected.settimeout(SECONDS)
    connected.connect(where.unix)
    return connected


def test_a_recorded_handshake_opens_nothing(pool):
    """Not at the listener that it was recorded at, nor at a later one with the same key."""
    with PatchListener("tcp", key=KEY) as first:
        recorder = Recorder(Address.parse(first.address).port)
        accepted = pool.submit(first.accept, SECONDS)
        connected = connect(f"tcp://127.0.0.1:{recorder.port}", key=KEY, timeout=SECONDS)
        connected.send(b"a patch", SECONDS)
        assert accepted.result().receive(SECONDS) == b"a patch"
        connected.close()
        accepted.result().close()
        recorder.close()
        with PatchListener("tcp", key=KEY) as second:
            for listening in (first, second):
                waiting = pool.submit(listening.accept, SECONDS)
                with stranger(listening.address) as again:
                    again.sendall(recorder.from_client)
                    await_hang_up(again)
                with pytest.raises(ProtocolError):  # its own challenge is no answer either
                    connect(listening.address, key=b"x" * 32, timeout=SECONDS)
                peer = connect(listening.address, key=KEY, timeout=SECONDS)
                assert waiting.result().kind == peer.kind == "tcp"
                assert "does not hold the same key" in listening.refused[0]


def test_a_listener_that_only_repeats_is_not_believed():
    """What a true listener has said does not prove anything to the next client."""
    with PatchListener("tcp", key=KEY) as listening, ThreadPoolExecutor(2) as pool:
        recorder = Recorder(Address.parse(listening.address).port)
        accepted = pool.submit(listening.accept, SECONDS)
        connect(f"tcp://127.0.0.1:{recorder.port}", key=KEY, timeout=SECONDS).close()
        accepted.result().close()
        recorder.close()
        with socket.create_server(("127.0.0.1", 0)) as false:

            def repeat():
                client, _ = false.accept()
                with client:
                    client.sendall(recorder.from_server)
                    await_hang_up(client)

            repeated = pool.submit(repeat)
            with pytest.raises(ProtocolError, match="does not hold the same key"):
                connect(f"tcp://127.0.0.1:{false.getsockname()[1]}", key=KEY, timeout=SECONDS)
            repeated.result(SECONDS)


@pytest.mark.parametrize("kind", ["tcp", "shm"])
def test_silent_strangers_make_room_for_the_awaited_peer(pool, kind):
    """More of them than may be in a handshake, and none of them is over before the deadline."""
    with PatchListener(kind, key=KEY, max_pending=2, handshake_timeout=SECONDS) as listening:
        silent = [stranger(listening.address) for _ in range(5)]
        accepted = pool.submit(listening.accept, SECONDS)
        # The first have been turned away, so the others are being listened to.
        assert silent[0].recv(1) == b""
        connected = connect(listening.address, key=KEY, timeout=SECONDS)
        assert accepted.result().kind == connected.kind
        assert any("already" in reason for reason in listening.refused)
        for peer in silent:
            peer.close()


@pytest.mark.parametrize("said", [b"\xff\xff\xff\xff", b"\0\0\x40\x01", b"\0\0\0\0"])
def test_a_length_out_of_bounds_is_hung_up_on(pool, said):
    with PatchListener("tcp", key=KEY) as listening:
        accepted = pool.submit(listening.accept, SECONDS)
        with stranger(listening.address) as rude:
            rude.sendall(said)
            await_hang_up(rude)
        connect(listening.address, key=KEY, timeout=SECONDS)
        accepted.result()
        assert "bytes, expected 1 to 16384" in listening.refused[0]


def test_a_frame_that_stops_halfway_ends_at_the_handshakes_deadline():
    with (
        PatchListener("tcp", key=KEY, handshake_timeout=0.2) as listening,
        stranger(listening.address) as slow,
    ):
        slow.sendall(b"\0\0\x10\0{")
        with pytest.raises(DeadlineError, match="took too long"):
            listening.accept(1.5)
        assert slow.recv(1) == b""


def test_another_user_is_refused_at_the_unix_socket(pool, monkeypatch):
    """Whatever the key: an abstract name has no file permissions."""
    with PatchListener("shm", key=KEY) as listening:
        accepted = pool.submit(listening.accept, SECONDS)
        monkeypatch.setattr(listener.os, "geteuid", lambda: os.getuid() + 1)
        with stranger(listening.address) as other:
            assert other.recv(1) == b""
        with pytest.raises(ProtocolError, match=r"expected .* our own"):
            connect(listening.address, key=KEY, timeout=SECONDS)
        monkeypatch.undo()
        connect(listening.address, key=KEY, timeout=SECONDS)
        accepted.result()
        assert "expected" in listening.refused[0]


def test_the_name_of_a_unix_socket_cannot_be_guessed():
    with PatchListener("shm", key=KEY) as one, PatchListener("shm", key=KEY) as other:
        names = {Address.parse(end.address).path for end in (one, other)}
        assert len(names) == 2
        assert all(len(name) == len("@pipelive-") + 32 for name in names)


def test_payloads_are_not_encrypted(pool):
    """Said in docs/security.md: the handshake authenticates, what follows is open."""
    with PatchListener("tcp", key=KEY) as listening:
        recorder = Recorder(Address.parse(listening.address).port)
        accepted = pool.submit(listening.accept, SECONDS)
        connected = connect(f"tcp://127.0.0.1:{recorder.port}", key=KEY, timeout=SECONDS)
        connected.send(b"in the open", SECONDS)
        assert accepted.result().receive(SECONDS) == b"in the open"
        assert b"in the open" in recorder.from_client
        assert KEY not in recorder.from_client + recorder.from_server
        connected.close()
        accepted.result().close()
        recorder.close()

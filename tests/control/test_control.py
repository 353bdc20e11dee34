import contextlib
import dataclasses
import os
import random
import socket
import threading

import pytest

from pipelive_kv.control import ControlClient, ControlEndpoint, ControlKey, ControlServer, wire
from pipelive_kv.errors import (
    ClosedError,
    DeadlineError,
    InvalidArgumentError,
    OverBudgetError,
    PipeliveError,
    ProtocolError,
)
from pipelive_kv.messages import Describe, Done, Grow, LiveBlocks, Observe


@pytest.fixture
def key():
    return ControlKey.generate()


@pytest.fixture
def server(key):
    server = ControlServer(ControlEndpoint("tcp://127.0.0.1:*", key))
    yield server
    server.close()


def _client(endpoint, name, handle):
    return ControlClient(endpoint, name, handle)


def test_request_and_reply(server):
    def handle(request):
        if isinstance(request, Grow):
            raise OverBudgetError(f"{request.capacity} blocks do not fit")
        if isinstance(request, Describe):
            raise KeyError("surprise")
        return LiveBlocks(((0, 3),), 7)

    client = _client(server.endpoint, "stage/0", handle)
    try:
        server.await_participants(["stage/0"], 10)
        assert server.call("stage/0", Observe(), LiveBlocks, 10) == LiveBlocks(((0, 3),), 7)
        with pytest.raises(OverBudgetError, match="stage/0: 9 blocks do not fit"):
            server.call("stage/0", Grow(9, 0, 1.0), Done, 10)
        with pytest.raises(PipeliveError, match="KeyError"):
            server.call("stage/0", Describe(), Done, 10)
        with pytest.raises(ProtocolError, match="LiveBlocks, expected Done"):
            server.call("stage/0", Observe(), Done, 10)
    finally:
        client.close()


def test_a_slow_request_does_not_hold_up_another(server):
    release = threading.Event()

    def handle(request):
        if isinstance(request, Grow):
            release.wait(timeout=60)
        return Done()

    client = _client(server.endpoint, "stage/0", handle)
    try:
        server.await_participants(["stage/0"], 10)
        slow = server.start("stage/0", Grow(1, 0, 1.0))
        assert server.call("stage/0", Observe(), Done, 10) == Done()
        assert not slow.done()
        release.set()
        assert server.finish("stage/0", Grow(1, 0, 1.0), slow, Done, 10) == Done()
    finally:
        release.set()
        client.close()


def test_deadlines_name_who_is_silent(server):
    silence = threading.Event()

    def handle(_request):
        silence.wait(timeout=60)
        return Done()

    client = _client(server.endpoint, "stage/1", handle)
    try:
        server.await_participants(["stage/1"], 10)
        with pytest.raises(DeadlineError, match="stage/1 did not answer Observe"):
            server.call("stage/1", Observe(), Done, 0.2)
        with pytest.raises(DeadlineError, match="no word from stage/0"):
            server.await_participants(["stage/0", "stage/1"], 0.2)
        with pytest.raises(ClosedError, match="stage/7 is not connected"):
            server.call("stage/7", Observe(), Done, 1)
    finally:
        silence.set()
        client.close()


def test_a_participant_may_come_first(key, tmp_path):
    endpoint = ControlEndpoint(f"ipc://{tmp_path}/control", key)
    client = _client(endpoint, "scheduler", lambda _: Done())
    try:
        for _ in range(2):  # and it finds the coordinator that takes the place of the first
            server = ControlServer(endpoint)
            try:
                server.await_participants(["scheduler"], 20)
                assert server.call("scheduler", Observe(), Done, 10) == Done()
            finally:
                server.close()
    finally:
        client.close()


def test_closing_ends_the_waits(server):
    silence = threading.Event()

    def handle(_request):
        silence.wait(timeout=60)
        return Done()

    client = _client(server.endpoint, "stage/0", handle)
    try:
        server.await_participants(["stage/0"], 10)
        future = server.start("stage/0", Observe())
        server.close()
        with pytest.raises(ClosedError):
            server.finish("stage/0", Observe(), future, Done, 10)
        with pytest.raises(ClosedError, match="closed"):
            server.call("stage/0", Observe(), Done, 1)
    finally:
        silence.set()
        client.close()


@pytest.mark.parametrize("known", ["nothing", "server_public", "client_public"])
def test_another_key_is_not_heard(server, key, known):
    other = ControlKey.generate()
    if known != "nothing":
        other = dataclasses.replace(other, **{known: getattr(key, known)})
    asked = threading.Event()

    def handle(_request):
        asked.set()
        return Done()

    stranger = _client(ControlEndpoint(server.endpoint.address, other), "stage/0", handle)
    try:
        with pytest.raises(DeadlineError, match="no word from stage/0"):
            server.await_participants(["stage/0"], 1.0)
        assert not asked.is_set()
    finally:
        stranger.close()


def test_garbage_on_the_port_does_no_harm(server):
    client = _client(server.endpoint, "stage/0", lambda _: Done())
    try:
        server.await_participants(["stage/0"], 10)
        port = int(server.endpoint.address.rsplit(":", 1)[1])
        seed = random.SystemRandom().randrange(2**32)
        print("seed", seed)
        source = random.Random(seed)
        for _ in range(20):
            with socket.create_connection(("127.0.0.1", port), timeout=5) as raw:
                raw.sendall(source.randbytes(source.randrange(1, 4096)))
        assert server.call("stage/0", Observe(), Done, 10) == Done()
    finally:
        client.close()


def test_listens_on_loopback_alone(server):
    port = int(server.endpoint.address.rsplit(":", 1)[1])
    with open("/proc/net/tcp", encoding="ascii") as file:
        rows = [line.split() for line in file.readlines()[1:]]
    listening = [row[1] for row in rows if row[3] == "0A" and int(row[1].split(":")[1], 16) == port]
    assert listening == [f"0100007F:{port:04X}"]
    with open("/proc/net/tcp6", encoding="ascii") as file:
        assert not [row for row in file if f":{port:04X} 0000000000000000" in row.upper()]


@pytest.mark.parametrize(
    "address",
    ["", "tcp://", "tcp://0.0.0.0:5", "tcp://*:5", "tcp://10.0.0.1:5", "tcp://[::]:5", "ipc://",
     "tcp://127.0.0.1", "tcp://127.0.0.1:0", "tcp://127.0.0.1:70000", "udp://127.0.0.1:5"],
)  # fmt: skip
def test_refuses_addresses(key, address):
    with pytest.raises(InvalidArgumentError, match="control address"):
        ControlEndpoint(address, key)


def test_remote_addresses_need_a_word(key):
    assert ControlEndpoint("tcp://10.0.0.1:5", key, allow_remote=True).address == "tcp://10.0.0.1:5"


def test_key_files(key, tmp_path):
    path = tmp_path / "key"
    key.save(path)
    assert ControlKey.load(path) == key
    assert path.stat().st_mode & 0o777 == 0o600
    with pytest.raises(FileExistsError):
        key.save(path)
    os.chmod(path, 0o644)
    with pytest.raises(InvalidArgumentError, match="0644, expected 0600"):
        ControlKey.load(path)
    with pytest.raises(InvalidArgumentError, match="not a control key"):
        ControlKey.from_bytes(b"{}")
    assert "secret=" not in repr(key)


def test_frames_that_are_none():
    good = wire.encode(wire.Call(3, Grow(1, 0, 2.0)))
    assert wire.decode(good) == wire.Call(3, Grow(1, 0, 2.0))
    seed = random.SystemRandom().randrange(2**32)
    print("seed", seed)
    source = random.Random(seed)
    for _ in range(2000):
        bad = bytearray(good)
        for _ in range(source.randrange(1, 4)):
            bad[source.randrange(len(bad))] = source.randrange(256)
        with contextlib.suppress(ProtocolError):
            wire.decode(bytes(bad[: source.randrange(len(bad) + 1)]))

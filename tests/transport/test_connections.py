"""Listeners and connections over real sockets."""

from __future__ import annotations

import gc
import os
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelive_kv.errors import (
    CancelledError,
    ClosedError,
    DeadlineError,
    DeviceError,
    InvalidArgumentError,
    ProtocolError,
)
from pipelive_kv.transport import Address, PatchListener, connect

KEY = b"0123456789abcdef0123456789abcdef"
SECONDS = 20


@pytest.fixture
def pool():
    with ThreadPoolExecutor(8) as pool:
        yield pool


def pair(pool, kind, address=None, **options):
    """Both ends of a connection: the accepting one first."""
    with PatchListener(kind, key=KEY, **options) as listener:
        accepted = pool.submit(listener.accept, SECONDS)
        connected = connect(address or listener.address, key=KEY, timeout=SECONDS)
        return accepted.result(), connected


@pytest.mark.parametrize(("kind", "expected"), [("tcp", "tcp"), ("shm", "shm"), ("auto", "shm")])
def test_messages_go_both_ways(pool, kind, expected):
    accepted, connected = pair(pool, kind)
    assert (accepted.kind, connected.kind) == (expected, expected)
    assert connected.reason
    for sender, receiver in ((accepted, connected), (connected, accepted)):
        sender.send(b"hello" * 1000, SECONDS)
        assert receiver.receive(SECONDS) == b"hello" * 1000
    connected.close()
    with pytest.raises(ClosedError):
        accepted.receive(SECONDS)
    accepted.cancel()
    with pytest.raises(CancelledError):
        accepted.receive(SECONDS)


def test_auto_takes_tcp_from_another_host(pool):
    with PatchListener("auto", key=KEY) as listener:
        where = Address.parse(listener.address)
        assert where.kind == "auto"
        elsewhere = Address(where.host, where.port, where.path, "another-boot")
        accepted = pool.submit(listener.accept, SECONDS)
        connected = connect(str(elsewhere), key=KEY, timeout=SECONDS)
        assert accepted.result().kind == connected.kind == "tcp"
        assert "another host" in connected.reason


def test_auto_takes_tcp_where_the_unix_socket_is_out_of_reach(pool):
    with PatchListener("auto", key=KEY) as listener:
        where = Address.parse(listener.address)
        hidden = Address(where.host, where.port, "@nobody-listens-here", where.boot_id)
        accepted = pool.submit(listener.accept, SECONDS)
        connected = connect(str(hidden), key=KEY, timeout=SECONDS)
        assert accepted.result().kind == connected.kind == "tcp"
        assert "out of reach" in connected.reason


@pytest.mark.parametrize("kind", ["tcp", "shm"])
def test_a_wrong_key_is_refused_and_the_next_peer_is_taken(pool, kind):
    with PatchListener(kind, key=KEY) as listener:
        accepted = pool.submit(listener.accept, SECONDS)
        for _ in range(3):
            with pytest.raises(ProtocolError, match="does not hold the same key"):
                connect(listener.address, key=b"x" * 32, timeout=SECONDS)
        connected = connect(listener.address, key=KEY, timeout=SECONDS)
        connected.send(b"x", SECONDS)
        assert accepted.result().receive(SECONDS) == b"x"
        assert len(listener.refused) == 3


@pytest.mark.parametrize("kind", ["tcp", "shm"])
def test_a_different_hello_is_named_at_both_ends(pool, kind):
    with PatchListener(kind, key=KEY, hello={"block_size": 16, "epoch": 1}) as listener:
        accepted = pool.submit(listener.accept, SECONDS)
        with pytest.raises(ProtocolError, match="block_size is 32 at the connecting end, 16"):
            connect(
                listener.address,
                key=KEY,
                timeout=SECONDS,
                hello={"block_size": 32, "epoch": 1, "more": True},
            )
        with pytest.raises(ProtocolError, match="block_size is 32 at the connecting end, 16"):
            accepted.result()
        # It goes on listening for one that fits.
        accepted = pool.submit(listener.accept, SECONDS)
        connected = connect(
            listener.address, key=KEY, timeout=SECONDS, hello={"block_size": 16, "more": True}
        )
        assert accepted.result().hello == {"block_size": 16, "more": True}
        assert connected.hello == {"block_size": 16, "epoch": 1}


def raw(address):
    where = Address.parse(address)
    if where.kind == "tcp":
        return socket.create_connection(where.tcp)
    connected = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connected.connect(where.unix)
    return connected


@pytest.mark.parametrize("kind", ["tcp", "shm"])
def test_silent_and_rude_peers_do_not_stand_in_the_way(pool, kind):
    with PatchListener(kind, key=KEY, max_pending=6) as listener:
        silent = [raw(listener.address) for _ in range(3)]
        rude = raw(listener.address)
        rude.sendall(os.urandom(200))
        gone = raw(listener.address)
        gone.close()
        accepted = pool.submit(listener.accept, SECONDS)
        connect(listener.address, key=KEY, timeout=SECONDS)
        accepted.result()
        for peer in (*silent, rude):
            peer.close()


def test_pending_handshakes_are_bounded_and_time_out(pool):
    with PatchListener("tcp", key=KEY, max_pending=2, handshake_timeout=0.2) as listener:
        silent = [raw(listener.address) for _ in range(3)]
        with pytest.raises(DeadlineError, match="nobody with the right key"):
            listener.accept(1.0)
        assert any("under way already" in reason for reason in listener.refused)
        assert any("too long" in reason for reason in listener.refused)
        for peer in silent:
            assert peer.recv(1) == b""
            peer.close()
        accepted = pool.submit(listener.accept, SECONDS)
        connect(listener.address, key=KEY, timeout=SECONDS)
        accepted.result()


def test_a_listener_that_says_nothing_is_given_up():
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"tcp://127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(DeadlineError, match="in time"):
            connect(address, key=KEY, timeout=0.2)


def test_a_listener_that_drips_is_given_up():
    with socket.create_server(("127.0.0.1", 0)) as server:
        stop = threading.Event()

        def drip():
            peer, _ = server.accept()
            with peer:
                while not stop.wait(0.02):
                    try:
                        peer.send(b"\0")
                    except OSError:
                        return

        thread = threading.Thread(target=drip)
        thread.start()
        address = f"tcp://127.0.0.1:{server.getsockname()[1]}"
        begin = time.monotonic()
        with pytest.raises((DeadlineError, ProtocolError)):
            connect(address, key=KEY, timeout=0.5)
        assert time.monotonic() - begin < SECONDS
        stop.set()
        thread.join()


@pytest.mark.parametrize(
    "address", ["tcp://127.0.0.1:1", "shm://@pipelive-nobody", "shm:///nowhere/at/all"]
)
def test_nobody_there(address):
    with pytest.raises(DeviceError, match="cannot reach"):
        connect(address, key=KEY, timeout=SECONDS)


@pytest.mark.parametrize("kind", ["tcp", "shm", "auto"])
def test_close_wakes_accept(pool, kind):
    listener = PatchListener(kind, key=KEY)
    accepted = pool.submit(listener.accept, SECONDS)
    listener.close()
    listener.close()
    with pytest.raises(ClosedError):
        accepted.result()
    with pytest.raises(ClosedError):
        listener.accept(SECONDS)
    with pytest.raises(DeviceError):
        connect(listener.address, key=KEY, timeout=SECONDS)


def listening_addresses(inodes):
    """The local addresses of the listening TCP sockets with these inodes, in hexadecimal."""
    found = {}
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        with open(table, encoding="ascii") as lines:
            next(lines)
            for line in lines:
                fields = line.split()
                if fields[3] == "0A" and int(fields[9]) in inodes:
                    found[int(fields[9])] = fields[1].split(":")[0]
    return list(found.values())


def own_socket_inodes():
    inodes = set()
    for fd in os.listdir("/proc/self/fd"):
        try:
            link = os.readlink(f"/proc/self/fd/{fd}")
        except OSError:
            continue
        if link.startswith("socket:["):
            inodes.add(int(link[8:-1]))
    return inodes


@pytest.mark.parametrize("kind", ["tcp", "auto"])
def test_listens_on_loopback_only(kind):
    before = own_socket_inodes()
    with PatchListener(kind, key=KEY):
        addresses = listening_addresses(own_socket_inodes() - before)
        assert addresses == ["0100007F"]
    with PatchListener(kind, key=KEY, host="0.0.0.0"):
        assert listening_addresses(own_socket_inodes() - before) == ["00000000"]


def test_nothing_is_left_behind(pool):
    def traffic():
        for kind in ("tcp", "shm", "auto"):
            accepted, connected = pair(pool, kind)
            connected.send(b"x" * 100000, SECONDS)
            accepted.receive(SECONDS)
            with PatchListener(kind, key=KEY) as listener:
                pool.submit(listener.accept, SECONDS)
                with pytest.raises(ProtocolError):
                    connect(listener.address, key=b"y" * 32, timeout=SECONDS)

    def held():
        gc.collect()
        with open("/proc/self/maps", encoding="ascii") as maps:
            mapped = sum("pipelive-channel" in line for line in maps)
        return len(os.listdir("/proc/self/fd")), mapped

    traffic()
    before = held()
    threads = threading.active_count()
    for _ in range(5):
        traffic()
    assert held() == before
    assert threading.active_count() <= max(threads, 9)


def test_arguments_are_checked():
    with pytest.raises(InvalidArgumentError, match="kind"):
        PatchListener("udp", key=KEY)
    with pytest.raises(InvalidArgumentError, match="key"):
        PatchListener("tcp", key=b"short")
    with pytest.raises(InvalidArgumentError, match="ring_bytes"):
        PatchListener("shm", key=KEY, ring_bytes=0)
    with pytest.raises(InvalidArgumentError, match="max_pending"):
        PatchListener("shm", key=KEY, max_pending=0)
    with pytest.raises(DeviceError, match="cannot listen"):
        PatchListener("tcp", key=KEY, host="203.0.113.1")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "tcp://",
        "tcp://host",
        "tcp://host:0",
        "tcp://host:99999",
        "udp://host:1",
        "shm://",
        "shm://@",
        "shm://relative",
        "auto://host:1",
        "auto://host:1?shm=@x",
        "auto://host:1?host=a&shm=relative",
        "host:1",
    ],
)
def test_bad_addresses_are_named(text):
    with pytest.raises(InvalidArgumentError, match="address is"):
        Address.parse(text)


names = st.text("abcdefghijklmnop-0123456789%&=? ", min_size=1, max_size=20)


@given(
    st.sampled_from(["127.0.0.1", "10.1.2.3", "::1", "node-7"]),
    st.integers(1, 65535),
    names,
    st.uuids(),
)
def test_addresses_survive_as_text(host, port, name, boot):
    for address in (
        Address(host, port),
        Address(path="@" + name),
        Address(path="/" + name),
        Address(host, port, "@" + name, str(boot)),
    ):
        assert Address.parse(str(address)) == address

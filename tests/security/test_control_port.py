"""Strangers and old recordings at the control port."""

from __future__ import annotations

import contextlib
import socket
import threading

import pytest
import zmq
from ports import Recorder, await_hang_up

from pipelive_kv.control import ControlClient, ControlEndpoint, ControlKey, ControlServer, wire
from pipelive_kv.errors import ClosedError, DeadlineError
from pipelive_kv.messages import Done, Observe

SECONDS = 60


@pytest.fixture
def key():
    return ControlKey.generate()


@pytest.fixture
def server(key):
    server = ControlServer(ControlEndpoint("tcp://127.0.0.1:*", key))
    yield server
    server.close()


@pytest.fixture
def client(server):
    client = ControlClient(server.endpoint, "stage/0", lambda _: Done())
    server.await_participants(["stage/0"], SECONDS)
    yield client
    client.close()


def port_of(server):
    return int(server.endpoint.address.rsplit(":", 1)[1])


def await_loss(server, name):
    server.await_loss([name], SECONDS)
    assert not server.is_connected(name)


def test_recorded_traffic_is_not_heard_again(server, key):
    recorder = Recorder(port_of(server))
    endpoint = ControlEndpoint(f"tcp://127.0.0.1:{recorder.port}", key)
    client = ControlClient(endpoint, "stage/0", lambda _: Done())
    try:
        server.await_participants(["stage/0"], SECONDS)
        assert server.call("stage/0", Observe(), Done, SECONDS) == Done()
    finally:
        client.close()
        recorder.close()
    await_loss(server, "stage/0")
    assert len(recorder.from_client) > 300
    assert b"stage/0" not in recorder.from_client  # nor can it be read
    with socket.create_connection(("127.0.0.1", port_of(server)), timeout=SECONDS) as again:
        again.sendall(recorder.from_client)
        await_hang_up(again)
    with pytest.raises(DeadlineError, match="no word from stage/0"):
        server.await_participants(["stage/0"], 0.5)
    with pytest.raises(ClosedError, match="not connected"):
        server.call("stage/0", Observe(), Done, 1)


def test_silent_connections_do_not_stand_in_the_way(server, client):
    silent = [socket.create_connection(("127.0.0.1", port_of(server))) for _ in range(64)]
    try:
        assert server.call("stage/0", Observe(), Done, SECONDS) == Done()
        late = ControlClient(server.endpoint, "stage/1", lambda _: Done())
        try:
            server.await_participants(["stage/1"], SECONDS)
        finally:
            late.close()
    finally:
        for connected in silent:
            connected.close()


@pytest.mark.parametrize(
    "mechanism", [zmq.NULL, zmq.PLAIN], ids=["without encryption", "by password"]
)
def test_other_mechanisms_are_refused(server, client, mechanism):
    context = zmq.Context()
    stranger = context.socket(zmq.DEALER)
    monitor = stranger.get_monitor_socket()
    try:
        if mechanism == zmq.PLAIN:
            stranger.plain_username, stranger.plain_password = b"stage", b"stage"
        stranger.connect(server.endpoint.address)
        with contextlib.suppress(zmq.Again):  # its connection may have been refused before
            stranger.send(wire.encode(wire.Hello("stage/9")), zmq.NOBLOCK)
        assert server.call("stage/0", Observe(), Done, SECONDS) == Done()
        with pytest.raises(DeadlineError, match="stage/9"):
            server.await_participants(["stage/9"], 0.3)
        assert monitor.poll(SECONDS * 1000)
    finally:
        stranger.disable_monitor()
        monitor.close()
        context.destroy(linger=0)


def holder_of(key, server):
    """A socket with the right key that says what it likes."""
    context = zmq.Context()
    made = context.socket(zmq.DEALER)
    made.curve_serverkey = key.server_public
    made.curve_publickey = key.client_public
    made.curve_secretkey = key.client_secret
    made.connect(server.endpoint.address)
    return context, made


def test_a_frame_that_is_too_long_ends_its_connection_alone(server, client, key):
    context, rude = holder_of(key, server)
    monitor = rude.get_monitor_socket(zmq.EVENT_DISCONNECTED)
    try:
        rude.send(bytes(wire.MAX_FRAME_BYTES + 1))
        assert monitor.poll(SECONDS * 1000), "it was not hung up on"
        assert server.call("stage/0", Observe(), Done, SECONDS) == Done()
    finally:
        rude.disable_monitor()
        monitor.close()
        context.destroy(linger=0)


def test_garbage_from_a_holder_of_the_key_is_survived(server, client, key):
    context, rude = holder_of(key, server)
    try:
        for said in (b"", b"\xc1" * 100, b"\x91" * 50000, wire.encode(wire.Reply(1, Done()))):
            rude.send(said)
        rude.send_multipart([b"a", b"b", b"c"])
        # Answered behind all that: what was said before has been dealt with.
        rude.send(wire.encode(wire.Hello("stage/5")))
        server.await_participants(["stage/5"], SECONDS)
        assert server.call("stage/0", Observe(), Done, SECONDS) == Done()
    finally:
        context.destroy(linger=0)


def test_an_answer_in_the_name_of_another_is_not_taken(server, key):
    """Numbers of requests are easily guessed; who answers is told by the connection."""
    asked, answer = threading.Event(), threading.Event()

    def handle(_request):
        asked.set()
        answer.wait(SECONDS)
        return Done()

    client = ControlClient(server.endpoint, "stage/0", handle)
    context, rude = holder_of(key, server)
    try:
        server.await_participants(["stage/0"], SECONDS)
        rude.send(wire.encode(wire.Hello("stage/5")))
        server.await_participants(["stage/5"], SECONDS)
        future = server.start("stage/0", Observe())
        assert asked.wait(SECONDS)
        for number in range(20):
            rude.send(wire.encode(wire.Failure(number, "CorruptError", "forged")))
        rude.send(wire.encode(wire.Hello("stage/6")))
        server.await_participants(["stage/6"], SECONDS)
        assert not future.done()
        answer.set()
        assert server.finish("stage/0", Observe(), future, Done, SECONDS) == Done()
    finally:
        answer.set()
        client.close()
        context.destroy(linger=0)

"""The handshake without sockets: both ends as generators, and everything between them changed."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelive_kv.errors import InvalidArgumentError, PipeliveError, ProtocolError
from pipelive_kv.transport import handshake
from pipelive_kv.transport.handshake import Agreed, Receive, Send

KEY = b"0123456789abcdef0123456789abcdef"


class End:
    """Runs one generator over an inbox and an outbox of bytes."""

    def __init__(self, steps):
        self.steps = steps
        self.inbox = bytearray()
        self.sent: list[bytes] = []
        self.agreed: Agreed | None = None
        self.error: PipeliveError | None = None
        self.wish = self._run(lambda: next(steps))

    def _run(self, step):
        try:
            wish = step()
            while isinstance(wish, Send):
                self.sent.append(wish.data)
                wish = self.steps.send(b"")
            return wish
        except StopIteration as stop:
            self.agreed = stop.value
        except PipeliveError as error:
            self.error = error
        return None

    def feed(self, data: bytes) -> None:
        self.inbox += data
        while isinstance(self.wish, Receive) and len(self.inbox) >= self.wish.size:
            size = self.wish.size
            piece, self.inbox = bytes(self.inbox[:size]), self.inbox[size:]
            self.wish = self._run(lambda data=piece: self.steps.send(data))


def shake(client, server, change=lambda number, data: data):
    """Pass frames between two ends until neither sends any more; frames are numbered from 1."""
    passed = {client: 0, server: 0}
    number = 0
    frames = []
    moved = True
    while moved:
        moved = False
        for sender, receiver in ((client, server), (server, client)):
            while passed[sender] < len(sender.sent):
                number += 1
                data = sender.sent[passed[sender]]
                passed[sender] += 1
                frames.append(data)
                receiver.feed(change(number, data))
                moved = True
    return frames


def ends(client_key=KEY, server_key=KEY, client_hello=None, server_hello=None):
    return (
        End(handshake.client(client_key, client_hello or {})),
        End(handshake.server(server_key, server_hello or {}, "tcp")),
    )


def test_both_agree():
    client, server = ends(client_hello={"epoch": 3, "a": None}, server_hello={"epoch": 3, "b": "x"})
    frames = shake(client, server)
    assert len(frames) == 4
    assert client.agreed == Agreed("tcp", {"epoch": 3, "b": "x"})
    assert server.agreed == Agreed("tcp", {"epoch": 3, "a": None})
    assert all(KEY not in frame for frame in frames)


def test_wrong_key_is_refused_by_the_client_first():
    client, server = ends(client_key=b"f" * 32, client_hello={"secret": "plans"})
    frames = shake(client, server)
    assert isinstance(client.error, ProtocolError)
    assert server.agreed is None
    # The hello goes only to a peer that has proved itself.
    assert len(frames) == 2


def test_a_client_that_does_not_care_who_answers_is_refused():
    """A client with the wrong key that skips its own check gets no further than its proof."""
    key = b"f" * 32
    steps = handshake.client(key, {})
    client, server = End(steps), End(handshake.server(KEY, {}, "tcp"))
    real, forged = {}, End(handshake.server(key, {}, "tcp"))

    def change(number, data):
        if number == 2:  # the answer it would have got from a server with its own key
            forged.feed(client.sent[0])
            real["challenge"] = data
            return forged.sent[0]
        return data

    shake(client, server, change)
    assert isinstance(server.error, ProtocolError)
    assert "does not hold the same key" in str(server.error)


@pytest.mark.parametrize("name", ["epoch", "block_size"])
def test_mismatch_is_named_at_both_ends(name):
    client, server = ends(client_hello={name: 1, "same": 2}, server_hello={name: 7, "same": 2})
    shake(client, server)
    for error in (client.error, server.error):
        assert isinstance(error, ProtocolError)
        assert f"{name} is 1 at the connecting end, 7 at the listening end" in str(error)
        assert "same" not in str(error)


def test_reflection_fails():
    """An attacker without the key sends every frame of the victim back to it, or to a twin."""
    client = End(handshake.client(KEY, {}))
    client.feed(client.sent[0])
    assert isinstance(client.error, ProtocolError)

    victim, twin = End(handshake.server(KEY, {}, "tcp")), End(handshake.server(KEY, {}, "tcp"))
    opening = End(handshake.client(KEY, {})).sent[0]
    victim.feed(opening)
    twin.feed(opening)
    victim.feed(twin.sent[0])  # a server's frame in place of a client's
    assert victim.agreed is None
    assert isinstance(victim.error, ProtocolError)


def test_replay_fails():
    client, server = ends()
    frames = shake(client, server)
    assert server.agreed
    again = End(handshake.server(KEY, {}, "tcp"))
    again.feed(frames[0])
    again.feed(frames[2])
    assert again.agreed is None
    assert isinstance(again.error, ProtocolError)
    other = End(handshake.client(KEY, {}))
    other.feed(frames[1])
    assert isinstance(other.error, ProtocolError)


@given(st.integers(1, 4), st.data())
def test_changed_bytes_never_make_the_ends_disagree(target, data):
    hello = {"epoch": 5, "dtype": "bfloat16"}
    client, server = ends(client_hello=hello, server_hello=hello)

    def change(number, frame):
        if number != target:
            return frame
        place = data.draw(st.integers(0, len(frame) - 1))
        value = data.draw(st.integers(0, 255))
        return frame[:place] + bytes([value]) + frame[place + 1 :]

    shake(client, server, change)
    if client.agreed is not None:
        assert client.agreed == Agreed("tcp", hello)
    if server.agreed is not None:
        assert server.agreed == Agreed("tcp", hello)


@given(st.binary(max_size=300), st.booleans())
def test_garbage_never_agrees(garbage, framed):
    data = len(garbage).to_bytes(4, "big") + garbage if framed else garbage
    for steps in (handshake.client(KEY, {}), handshake.server(KEY, {}, "shm")):
        end = End(steps)
        end.feed(data)
        assert end.agreed is None


def test_a_huge_frame_is_refused_before_it_is_read():
    server = End(handshake.server(KEY, {}, "tcp"))
    server.feed((1 << 31).to_bytes(4, "big"))
    assert "2147483648 bytes" in str(server.error)


@pytest.mark.parametrize("key", [b"", b"short", "0123456789abcdef0123456789abcdef", None])
def test_keys_are_checked(key):
    with pytest.raises(InvalidArgumentError, match="key is"):
        handshake.check_key(key)

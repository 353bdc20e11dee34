"""How the two ends of a patch connection prove to each other that they hold the same key.

Four frames, each a big-endian length of four bytes and a JSON object:

1. client -> server: ``Opening``: protocol, version, a fresh nonce.
2. server -> client: ``Challenge``: the same, the kind of channel it offers, and a MAC.
3. client -> server: ``Proof``: the client's hello, and a MAC.
4. server -> client: ``Verdict``: the server's hello or why it refuses, and a MAC.

A MAC is HMAC-SHA256 under the shared key over the role of its sender, a hash of everything that was
said before and the frame's own content. The role keeps a frame from being sent back to where it
came from; the two nonces keep it from being used again. Hellos come under the MAC, and are sent
only to a peer that has proved itself (the client's) or to one that was verified (the server's).
Nothing after the handshake is encrypted or authenticated: the key keeps strangers out, it does not
protect against somebody who can change packets on the way.

The functions are generators without input or output of their own: they yield what is to be sent and
receive what has come, so that a listener can drive many at once and tests can change every byte.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import struct
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import msgspec

from pipelive_kv.errors import InvalidArgumentError, ProtocolError

PROTOCOL = "pipelive-patch"
VERSION = 1
NONCE_BYTES = 32
MAC_BYTES = hashlib.sha256().digest_size
MAX_FRAME_BYTES = 16 << 10
MIN_KEY_BYTES = 16
_LENGTH = struct.Struct(">I")

Hello = Mapping[str, "str | int | bool | None"]


class Opening(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Frame 1."""

    protocol: str
    version: int
    nonce: bytes


class Challenge(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Frame 2."""

    protocol: str
    version: int
    nonce: bytes
    kind: Literal["shm", "tcp"]
    mac: bytes


class Proof(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Frame 3; ``hello`` is JSON."""

    hello: bytes
    mac: bytes


class Verdict(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Frame 4; ``hello`` is JSON, ``refusal`` empty where all is well."""

    hello: bytes
    refusal: str
    mac: bytes


@dataclass(frozen=True)
class Send:
    """Asks the driver to send these bytes."""

    data: bytes


@dataclass(frozen=True)
class Receive:
    """Asks the driver for exactly this many bytes."""

    size: int


@dataclass(frozen=True)
class Agreed:
    """What a finished handshake knows of the peer."""

    kind: Literal["shm", "tcp"]
    hello: dict[str, Any]


Handshake = Generator["Send | Receive", bytes, Agreed]
_Frame = TypeVar("_Frame", Opening, Challenge, Proof, Verdict)


class HelloMismatchError(ProtocolError):
    """The peer holds the key, but says something else about itself than this end."""


def check_key(key: bytes) -> bytes:
    """``key`` itself; raises InvalidArgumentError where it is no bytes or too short."""
    if not isinstance(key, bytes) or len(key) < MIN_KEY_BYTES:
        shape = f"{len(key)} bytes" if isinstance(key, bytes) else type(key).__name__
        raise InvalidArgumentError(f"key is {shape}, expected {MIN_KEY_BYTES} bytes or more")
    return key


def client(key: bytes, hello: Hello) -> Handshake:
    """The connecting end. Raises ProtocolError where the peer is not who it should be."""
    transcript = _Transcript(key)
    opening = Opening(PROTOCOL, VERSION, secrets.token_bytes(NONCE_BYTES))
    yield from _send(opening, transcript)

    challenge = yield from _receive(Challenge)
    _check_version(challenge.protocol, challenge.version, challenge.nonce)
    if hmac.compare_digest(challenge.nonce, opening.nonce):
        raise ProtocolError("handshake: the peer sent our own nonce back")
    said = _challenge_content(challenge)
    transcript.verify("server", said, challenge.mac, "the listener does not hold the same key")
    transcript.add(msgspec.json.encode(challenge))

    own = msgspec.json.encode(dict(hello))
    proof = Proof(own, transcript.mac("client", own))
    yield from _send(proof, transcript)

    verdict = yield from _receive(Verdict)
    said = verdict.hello + b"\0" + verdict.refusal.encode()
    transcript.verify("server", said, verdict.mac, "the listener does not hold the same key")
    if verdict.refusal:
        raise ProtocolError(f"handshake: the listener refused: {verdict.refusal}")
    return Agreed(challenge.kind, _decode_hello(verdict.hello))


def server(key: bytes, hello: Hello, kind: Literal["shm", "tcp"]) -> Handshake:
    """The listening end. Raises ProtocolError where the peer is not who it should be."""
    transcript = _Transcript(key)
    opening = yield from _receive(Opening)
    _check_version(opening.protocol, opening.version, opening.nonce)
    transcript.add(msgspec.json.encode(opening))

    challenge = Challenge(PROTOCOL, VERSION, secrets.token_bytes(NONCE_BYTES), kind, b"")
    mac = transcript.mac("server", _challenge_content(challenge))
    yield from _send(msgspec.structs.replace(challenge, mac=mac), transcript)

    proof = yield from _receive(Proof)
    transcript.verify("client", proof.hello, proof.mac, "the peer does not hold the same key")
    transcript.add(msgspec.json.encode(proof))

    theirs = _decode_hello(proof.hello)
    refusal = mismatch(theirs, hello)
    own = msgspec.json.encode(dict(hello))
    mac = transcript.mac("server", own + b"\0" + refusal.encode())
    yield from _send(Verdict(own, refusal, mac), transcript)
    if refusal:
        raise HelloMismatchError(f"handshake: {refusal}")
    return Agreed(kind, theirs)


def mismatch(theirs: Hello, ours: Hello) -> str:
    """The first few fields that both ends name and that differ, in words; empty where none do.

    What an end says about its abilities (``transport.*``) is no matter of equality.
    """
    differing = [
        f"{name} is {theirs[name]!r} at the connecting end, {ours[name]!r} at the listening end"
        for name in sorted(theirs.keys() & ours.keys())
        if theirs[name] != ours[name] and not name.startswith("transport.")
    ]
    return "; ".join(differing[:8])


class _Transcript:
    """A running hash of what was said, and the MACs over it."""

    def __init__(self, key: bytes) -> None:
        self._key = check_key(key)
        self._hash = hashlib.sha256(PROTOCOL.encode())

    def add(self, frame: bytes) -> None:
        self._hash.update(_LENGTH.pack(len(frame)) + frame)

    def mac(self, role: str, content: bytes) -> bytes:
        data = role.encode() + b"\0" + self._hash.digest() + content
        return hmac.digest(self._key, data, "sha256")

    def verify(self, role: str, content: bytes, mac: bytes, message: str) -> None:
        if not hmac.compare_digest(self.mac(role, content), mac):
            raise ProtocolError(f"handshake: {message}")


def _challenge_content(challenge: Challenge) -> bytes:
    return challenge.nonce + challenge.kind.encode()


def _check_version(protocol: str, version: int, nonce: bytes) -> None:
    if protocol != PROTOCOL:
        raise ProtocolError(f"handshake: protocol is {protocol!r} at the peer, {PROTOCOL!r} here")
    if version != VERSION:
        raise ProtocolError(f"handshake: version is {version} at the peer, {VERSION} here")
    if len(nonce) != NONCE_BYTES:
        raise ProtocolError(f"handshake: a nonce of {len(nonce)} bytes, expected {NONCE_BYTES}")


def _decode_hello(data: bytes) -> dict[str, Any]:
    try:
        hello: dict[str, Any] = msgspec.json.decode(data, type=dict[str, str | int | bool | None])
    except msgspec.MsgspecError as error:
        raise ProtocolError(f"handshake: the peer's hello: {error}") from None
    return hello


def _send(
    frame: Opening | Challenge | Proof | Verdict, transcript: _Transcript
) -> Generator[Send | Receive, bytes, None]:
    body = msgspec.json.encode(frame)
    if len(body) > MAX_FRAME_BYTES:
        raise InvalidArgumentError(
            f"hello makes a frame of {len(body)} bytes, expected {MAX_FRAME_BYTES} or less"
        )
    transcript.add(body)
    yield Send(_LENGTH.pack(len(body)) + body)


def _receive(kind: type[_Frame]) -> Generator[Send | Receive, bytes, _Frame]:
    (size,) = _LENGTH.unpack((yield Receive(_LENGTH.size)))
    if not 0 < size <= MAX_FRAME_BYTES:
        raise ProtocolError(f"handshake: a frame of {size} bytes, expected 1 to {MAX_FRAME_BYTES}")
    body = yield Receive(size)
    try:
        return msgspec.json.decode(body, type=kind)
    except (msgspec.MsgspecError, UnicodeError) as error:
        raise ProtocolError(f"handshake: not a {kind.__name__}: {error}") from None

"""The frames of the control plane: one msgpack message each, decoded into typed structs only."""

from __future__ import annotations

from typing import Any, TypeAlias

import msgspec
import zmq

from pipelive_kv.errors import PipeliveError, ProtocolError, by_name
from pipelive_kv.messages import Answer, Request

VERSION = 3
"""Raised with every change of a message; unlike versions refuse each other by name."""

HEARTBEAT_SECONDS = 2.0
"""How often a connection that carries nothing is tried."""

SILENCE_SECONDS = 30.0
"""A connection that is silent for that long counts as lost: its machine has gone, or its process is
stopped. A process that ends is noticed at once, since the system closes its connections."""

MAX_FRAME_BYTES = 16 << 20
"""A larger frame is refused by the socket before it is read into memory."""


class Hello(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="hello"):
    """A participant announces itself; repeated, since a coordinator may come later or anew."""

    name: str
    version: int = VERSION


class Welcome(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="welcome"):
    """The coordinator has heard the participant."""

    version: int = VERSION


class Call(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="call"):
    """A request to a participant."""

    number: int
    body: Request


class Reply(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="reply"):
    """A participant's answer."""

    number: int
    body: Answer


class Failure(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="failure"):
    """A participant could not carry out the request."""

    number: int
    error: str
    """The class name of the error."""
    message: str


Frame: TypeAlias = Hello | Welcome | Call | Reply | Failure

_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[Frame] = msgspec.msgpack.Decoder(Frame)


def limit(socket: zmq.Socket[Any]) -> None:
    """Bound what a socket takes, and how long it believes in a silent connection."""
    socket.maxmsgsize = MAX_FRAME_BYTES
    socket.heartbeat_ivl = int(HEARTBEAT_SECONDS * 1000)
    socket.heartbeat_timeout = int(SILENCE_SECONDS * 1000)


def encode(frame: Frame) -> bytes:
    """The bytes of a frame."""
    return _encoder.encode(frame)


def decode(content: bytes) -> Frame:
    """The frame in ``content``.

    Raises:
        ProtocolError: it is not a frame of this version.
    """
    try:
        return _decoder.decode(content)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ProtocolError(
            f"control frame of {len(content)} bytes is malformed: {error}"
        ) from error


def failure_of(number: int, error: BaseException) -> Failure:
    """What to answer where carrying out request ``number`` raised ``error``."""
    return Failure(number, type(error).__name__, str(error))


def error_of(failure: Failure, who: str) -> PipeliveError:
    """The exception that ``failure`` stands for, raised again at the side of the caller."""
    kind = by_name(failure.error)
    prefix = "" if kind is not PipeliveError else f"{failure.error}: "
    return kind(f"{who}: {prefix}{failure.message}")

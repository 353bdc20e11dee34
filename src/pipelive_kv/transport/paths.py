"""Setting up how payloads travel: through the host, by P2P or by NCCL.

What both ends can do says what is tried (see :mod:`~pipelive_kv.transport.abilities`). It is set up
over the socket, before the core gets it, and tried with a few bytes; each end tells the other how
that went, so that both fall back together.
"""

from __future__ import annotations

import os
import random
import secrets
import socket
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipelive_kv import _core
from pipelive_kv.errors import PipeliveError, ProtocolError
from pipelive_kv.transport.abilities import Abilities, Path, choose
from pipelive_kv.transport.frames import Frames
from pipelive_kv.transport.handshake import HelloMismatchError
from pipelive_kv.transport.nccl import nccl_candidates

NCCL_SECONDS = 60.0
"""How long a communicator may take to come up."""
TRANSFER_SECONDS = 10.0
"""How long one NCCL transfer may take once both ends have issued it."""
_NCCL_SHARE = 0.6
"""Of the time that is left, what NCCL may use, so that the way through the host still has some."""
_TURN_SECONDS = 5.0
"""How long a turn is held for the peer's word, which comes at once where the peer runs at all."""
STAGING_PIECE_BYTES: int = _core.STAGING_PIECE_BYTES
STAGING_PIECES: int = _core.STAGING_PIECES
_MOST_PIECES = 1024
_SAMPLE_BYTES = 64
_SAMPLE_SECONDS = 5.0
"""How long the device may take to write or read the sample."""


@dataclass
class Setup:
    """What was set up over the socket; :meth:`channel` puts it on top of the base channel."""

    path: Path
    why: str
    device: Any = None
    own: Any = None
    peer: Any = None
    into: Any = None
    comm: Any = None

    def channel(self, base: Any) -> Any:
        """The core's channel; ``base`` is the channel that messages and notes go over."""
        if self.path == "p2p":
            return _core.p2p_channel(base, self.device, self.own, self.peer)
        if self.path == "nccl":
            return _core.nccl_channel(base, self.comm, self.own, self.into, TRANSFER_SECONDS)
        return base


def set_up_source(
    connected: socket.socket,
    device: Any,
    own: Abilities,
    peer: Abilities,
    base: str,
    ends_at: float,
) -> Setup:
    """The connecting end's half; ``connected`` is at rest after the handshake.

    Raises HelloMismatchError where the one path that the listening end takes cannot be set up,
    DeadlineError, ClosedError, and ProtocolError for a peer that does not keep to it.
    """
    path, why = choose(own, peer, base)
    link = Frames(connected, ends_at)
    if path == "p2p":
        setup, failed = _offer_staging(Setup(path, why, device), link)
        if not failed:
            return setup
        path, why = choose(own, peer, base, p2p_failed=failed)
    if path == "nccl":
        return _call_nccl(Setup(path, why, device), link, peer)
    return Setup("host", why)


def set_up_target(
    connected: socket.socket,
    device: Any,
    own: Abilities,
    peer: Abilities,
    base: str,
    ends_at: float,
    *,
    nccl_seconds: float = 0.0,
) -> Setup:
    """The listening end's half; where NCCL is tried it may take ``nccl_seconds`` longer."""
    path, why = choose(peer, own, base)
    link = Frames(connected, ends_at)
    if path == "p2p":
        setup, failed = _take_staging(Setup(path, why, device), link)
        if not failed:
            return setup
        path, why = choose(peer, own, base, p2p_failed=failed)
    if path == "nccl":
        link.ends_at += nccl_seconds
        return _answer_nccl(Setup(path, why, device), link, own)
    return Setup("host", why)


def _offer_staging(setup: Setup, link: Frames) -> tuple[Setup, str]:
    """The source's half of P2P; why it failed, empty where it did not."""
    sample = secrets.token_bytes(_SAMPLE_BYTES)
    try:
        setup.own = _core.Staging(setup.device, STAGING_PIECE_BYTES, STAGING_PIECES)
        setup.own.put_sample(sample, _SAMPLE_SECONDS)
        fd, offset, nbytes = setup.own.export_memory()
    except PipeliveError as error:
        setup.own = None
        link.send({"ok": False, "why": str(error)[:4000]})
        return setup, f"the source has no staging: {error}"
    try:
        said = {
            "ok": True,
            "offset": offset,
            "nbytes": nbytes,
            "piece_bytes": setup.own.piece_bytes,
            "pieces": setup.own.pieces,
            "sample": sample.hex(),
        }
        link.send(said, fd)
    finally:
        os.close(fd)
    answer = link.receive()
    if answer.get("ok"):
        return setup, ""
    setup.own = None
    return setup, f"the target cannot use it: {answer.get('why')}"


def _take_staging(setup: Setup, link: Frames) -> tuple[Setup, str]:
    """The target's half of P2P; why it failed, empty where it did not."""
    said, fds = link.receive_with_fds()
    try:
        if not said.get("ok"):
            return setup, f"the source: {said.get('why')}"
        said_of = (said.get(name) for name in ("offset", "nbytes", "piece_bytes", "pieces"))
        # The core takes unsigned numbers, `pieces` of 32 bits; what it says of them is its own.
        shape = [n for n in said_of if type(n) is int and 0 <= n < 1 << 40]
        if len(fds) != 1 or len(shape) != 4 or shape[3] > _MOST_PIECES:
            raise ProtocolError("the source's staging: no descriptor, or no sizes, came with it")
        sample = _sample_of(said.get("sample"))
        try:
            setup.peer = _core.PeerStaging(setup.device, fds.pop(), *shape)
            read = setup.peer.has_sample(sample, _SAMPLE_SECONDS)
            failed = "" if read else "its memory is mapped, but reads as other bytes than it holds"
        except PipeliveError as error:
            failed = str(error)
    finally:
        for fd in fds:
            os.close(fd)
    if failed:
        setup.peer = None
        link.send({"ok": False, "why": failed[:4000]})
        return setup, f"the target cannot use it: {failed}"
    link.send({"ok": True})
    if setup.peer.writable:
        setup.why += "; this driver maps the source's staging writable"
    return setup, ""


def _sample_of(said: Any) -> bytes:
    try:
        sample = bytes.fromhex(said) if isinstance(said, str) else b""
    except ValueError:
        sample = b""
    if len(sample) != _SAMPLE_BYTES:
        raise ProtocolError(
            f"the source's staging: no sample of {_SAMPLE_BYTES} bytes came with it"
        )
    return sample


def _call_nccl(setup: Setup, link: Frames, target: Abilities) -> Setup:
    """The source's half of NCCL."""
    try:
        unique = _core.nccl_unique_id(nccl_candidates())
    except PipeliveError as error:
        link.send({"ok": False, "why": str(error)[:4000]})
        return _fall_back(setup, target, str(error))
    seconds = _NCCL_SHARE * max(0.0, link.ends_at - time.monotonic())
    link.send({"ok": True, "id": unique.hex(), "seconds": seconds})
    return _bring_up(setup, link, unique, 0, target, seconds)


def _answer_nccl(setup: Setup, link: Frames, target: Abilities) -> Setup:
    """The target's half of NCCL."""
    said = link.receive()
    if not said.get("ok"):
        return _fall_back(setup, target, f"the source: {said.get('why')}")
    try:
        unique = bytes.fromhex(str(said.get("id")))
    except ValueError:
        raise ProtocolError("the source's NCCL id is no hexadecimal number") from None
    seconds = _NCCL_SHARE * max(0.0, link.ends_at - time.monotonic())
    said_seconds = said.get("seconds")
    if isinstance(said_seconds, (int, float)) and not isinstance(said_seconds, bool):
        seconds = max(0.0, min(seconds, said_seconds))  # who connects mostly has less time
    return _bring_up(setup, link, unique, 1, target, seconds)


def _bring_up(
    setup: Setup, link: Frames, unique: bytes, rank: int, target: Abilities, seconds: float
) -> Setup:
    """Make the communicator and try it; both ends take it, or neither does.

    The two go on in rounds: each says how it went and hears the other, and the first round in which
    one of them failed is the last. While NCCL works the connection is watched, as an end whose own
    NCCL has failed says so, or hangs up.
    """
    until = time.monotonic() + seconds
    why = ""
    try:
        setup.own = _core.Staging(setup.device, STAGING_PIECE_BYTES, 1)
        setup.into = _core.Staging(setup.device, STAGING_PIECE_BYTES, 1)
        setup.comm = _core.NcclComm(
            nccl_candidates(), setup.device, unique, rank, 2, seconds, link.fileno()
        )
    except PipeliveError as error:
        why = str(error)
    why, _ = _round(link, why)
    if not why:
        why = _first_transfer(setup, link, rank, until)
    if why:
        _let_go(setup)
        return _fall_back(setup, target, why)
    return setup


def _let_go(setup: Setup) -> None:
    """End what was set up, without waiting: NCCL may need seconds to let go of it."""
    if setup.comm is not None:
        setup.comm.abort()
    parts = [setup.comm, setup.own, setup.into]
    setup.comm = setup.own = setup.into = None
    threading.Thread(target=parts.clear, name="pipelive-nccl-end", daemon=True).start()


def _first_transfer(setup: Setup, link: Frames, rank: int, until: float) -> str:
    """Transfer both ways; NCCL connects only then. Why it failed, at either end; empty if not.

    Both devices' turns are in hand meanwhile. They are tried for, and given back where the other
    end did not get its own.
    """
    name, _, _ = _core.device_identity(setup.device)
    turn = _core.DeviceTurn(name)
    ends_at = link.ends_at
    holder = ""  # of the other end's turn, when it was last tried for
    while True:
        why = ""
        if time.monotonic() >= until:
            why = (
                "the devices' turns were not free together; they were held by "
                f"{turn.holder or 'nobody'} here, by {holder or 'nobody'} at the other end"
            )
        mine: bool = not why and turn.try_take("NCCL's first transfer")
        try:
            link.ends_at = min(ends_at, time.monotonic() + _TURN_SECONDS)
            why, answer = _round(link, why, mine, "" if mine else turn.holder)
            link.ends_at = ends_at
            if why:
                return why
            holder = str(answer.get("holder", ""))
            if mine and answer.get("turn") is True:
                try:
                    seconds = min(TRANSFER_SECONDS, max(0.0, until - time.monotonic()))
                    setup.comm.exchange_staging(
                        setup.own, setup.into, 1 - rank, seconds, link.fileno()
                    )
                except PipeliveError as error:
                    why = str(error)
                break
        finally:
            if mine:
                turn.give()
        time.sleep(random.uniform(0.0, 0.002))
    why, _ = _round(link, why)
    return why


def _round(
    link: Frames, why: str, turn: bool = False, holder: str = ""
) -> tuple[str, Mapping[str, Any]]:
    """Say how it went here, and who has the turn; why it cannot go on, and what the other says."""
    link.send({"ok": not why, "why": why[:4000], "turn": turn, "holder": holder[:400]})
    answer = link.receive()
    if not why and not answer.get("ok"):
        why = f"the other end: {answer.get('why')}"
    return why, answer


def _fall_back(setup: Setup, target: Abilities, why: str) -> Setup:
    if target.want != "auto":
        raise HelloMismatchError(f"{setup.path} was asked for, but could not be set up: {why}")
    return Setup("host", f"{setup.path} could not be set up: {why} ({setup.why})")

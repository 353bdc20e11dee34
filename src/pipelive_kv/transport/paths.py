"""Choosing how payloads travel, and setting that up: through the host, by P2P or by NCCL.

Both ends say in their hello what they can do (fields that begin with ``transport.``), and both
reckon from the two hellos what is taken, so nothing has to be agreed on. What is taken is then set
up over the socket, before the core gets it; each end tells the other how that went, so that both
fall back together.
"""

from __future__ import annotations

import contextlib
import ipaddress
import json
import os
import random
import socket
import struct
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pipelive_kv import _core
from pipelive_kv.errors import ClosedError, DeadlineError, PipeliveError, ProtocolError
from pipelive_kv.transport.handshake import HelloMismatchError
from pipelive_kv.transport.nccl import nccl_candidates, nccl_probe

PREFIX = "transport."
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
_MAX_FRAME_BYTES = 16 << 10
_MOST_PIECES = 1024
_MOST_DESCRIPTORS = 4
_LENGTH = struct.Struct(">I")

Path = Literal["host", "p2p", "nccl"]
Hello = Mapping[str, "str | int | bool | None"]


@dataclass(frozen=True)
class Abilities:
    """What one end can do, as it says in its hello."""

    want: str = "auto"
    """Of the listening end: ``auto``, or the only path that it takes."""
    device: str = ""
    """The name of the device that the layers lie on; empty where that is host memory."""
    identity: str = ""
    """Of the GPU, whatever number a process gives it."""
    p2p: bool = False
    """Its memory can be handed to another process."""
    p2p_missing: str = ""
    nccl: int = 0
    """The version code of its NCCL; 0 where there is none."""
    nccl_missing: str = ""
    multi_rank: bool = False
    """Its NCCL is told to put two ranks on one GPU (NCCL_MULTI_RANK_GPU_ENABLE=1)."""
    again: bool = False
    """Of the connecting end: a connection that was lost is made again, and there is no time for
    NCCL."""

    def hello(self) -> dict[str, str | int | bool | None]:
        """As fields of a hello."""
        return {f"{PREFIX}{name}": value for name, value in vars(self).items()}

    @classmethod
    def of_hello(cls, hello: Hello) -> Abilities:
        """What a hello says; a field of the wrong kind counts as not said."""
        said: dict[str, Any] = {}
        for name, default in vars(cls()).items():
            value = hello.get(PREFIX + name, default)
            said[name] = value if type(value) is type(default) else default
        return cls(**said)


def said_beside(hello: Hello) -> dict[str, str | int | bool | None]:
    """What a hello says of other things than the path."""
    return {name: value for name, value in hello.items() if not name.startswith(PREFIX)}


def abilities(device: Any, want: str, *, host: str | None = None, again: bool = False) -> Abilities:
    """What this end can do with layers on ``device`` (a ``_core.Device``, or None).

    ``host`` is the address that a listening end listens on, ``again`` as in :class:`Abilities`.
    """
    if device is None:
        missing = "no device was given"
        return Abilities(want, p2p_missing=missing, nccl_missing=missing, again=again)
    name, identity, exportable = _core.device_identity(device)
    p2p_missing = "" if exportable else f"{name} cannot export its memory as file descriptors"
    nccl, nccl_missing = 0, f"{name} is no GPU"
    if again:
        nccl_missing = "a connection is being made again"
    elif want == "nccl" or (want == "auto" and name.startswith("cuda")):
        nccl_missing = "" if want == "nccl" else _beyond_loopback(host)
        if not nccl_missing:
            probe = nccl_probe()
            nccl, nccl_missing = probe.version_code, probe.problem
    elif name.startswith("cuda"):
        nccl_missing = "it was not asked for"
    return Abilities(
        want,
        name,
        identity,
        exportable,
        p2p_missing,
        nccl,
        nccl_missing[:400],
        os.environ.get("NCCL_MULTI_RANK_GPU_ENABLE") == "1",
        again,
    )


def _beyond_loopback(host: str | None) -> str:
    """Why NCCL, whose sockets listen where it likes, is not offered beside ``host``."""
    if host is None or not _is_loopback(host):
        return ""
    # NCCL takes prefixes, "=" before names in full, and "^" before what it shall not take.
    chosen = os.environ.get("NCCL_SOCKET_IFNAME", "").removeprefix("=").split(",")
    if all(name == "lo" for name in chosen):
        return ""
    return (
        f"NCCL would listen beyond {host}; ask for it by name, listen on another address, or set "
        "NCCL_SOCKET_IFNAME=lo"
    )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def choose(source: Abilities, target: Abilities, base: str) -> tuple[Path, str]:
    """The path that both ends take over a connection of kind ``base``, and why.

    ``source`` is the connecting end, ``target`` the listening one. Raises ProtocolError, at both
    ends, where the one path that is wanted cannot be taken.
    """
    want = target.want
    if want in ("shm", "tcp", "host"):
        return "host", f"the listener takes nothing but {want}"
    no_p2p = _no_p2p(source, target, base)
    no_nccl = _no_nccl(source, target)
    if want == "p2p":
        if no_p2p:
            raise HelloMismatchError(f"p2p was asked for, but {no_p2p}")
        return "p2p", "the listener takes nothing but p2p"
    if want == "nccl" and source.again:
        # Asked for by name, but by now the choice is between this and the loss of the move.
        return "host", "a connection is being made again"
    if want == "nccl":
        if no_nccl:
            raise HelloMismatchError(f"nccl was asked for, but {no_nccl}")
        return "nccl", "the listener takes nothing but nccl"
    for end, said in (("source", source), ("target", target)):
        if not said.device.startswith("cuda"):
            return "host", f"the layers of the {end} lie in host memory"
    if not no_p2p:
        return "p2p", "both ends are on one host and can share device memory"
    if not no_nccl:
        return "nccl", f"no p2p ({no_p2p}); both ends have the same NCCL"
    return "host", f"no p2p ({no_p2p}), no NCCL ({no_nccl})"


def _no_p2p(source: Abilities, target: Abilities, base: str) -> str:
    if base != "shm":
        return "it needs a Unix socket between the two"
    for end, said in (("source", source), ("target", target)):
        if not said.p2p:
            return f"at the {end}: {said.p2p_missing or 'it cannot'}"
    kinds = {source.device.split(":")[0], target.device.split(":")[0]}
    return "" if len(kinds) == 1 else f"{source.device} and {target.device} differ in kind"


def _no_nccl(source: Abilities, target: Abilities) -> str:
    for end, said in (("source", source), ("target", target)):
        if said.nccl == 0:
            return f"at the {end}: {said.nccl_missing or 'it has none'}"
    if source.nccl != target.nccl:  # also in the patch release: NCCL says so at neither end
        return f"versions {source.nccl} and {target.nccl} differ"
    if source.identity and source.identity == target.identity:
        if source.nccl < 23000:
            return "both ends are on one GPU, which NCCL before 2.30 refuses"
        for end, said in (("source", source), ("target", target)):
            if not said.multi_rank:
                return f"both ends are on one GPU, and at the {end} NCCL_MULTI_RANK_GPU_ENABLE=0"
    return ""


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
    """The connecting end's half; ``connected`` is at rest after the handshake."""
    path, why = choose(own, peer, base)
    if path == "host":
        return Setup("host", why)
    setup = Setup(path, why, device)
    link = _Frames(connected, ends_at)
    if path == "p2p":
        try:
            setup.own = _core.Staging(device, STAGING_PIECE_BYTES, STAGING_PIECES)
            fd, offset, nbytes = setup.own.export_memory()
        except PipeliveError as error:
            link.send({"ok": False, "why": str(error)})
            return _fall_back(setup, peer, f"the source has no staging: {error}")
        try:
            said = {
                "ok": True,
                "offset": offset,
                "nbytes": nbytes,
                "piece_bytes": setup.own.piece_bytes,
                "pieces": setup.own.pieces,
            }
            link.send(said, fd)
        finally:
            os.close(fd)
        answer = link.receive()
        if not answer.get("ok"):
            return _fall_back(setup, peer, f"the target cannot map it: {answer.get('why')}")
        return setup
    try:
        unique = _core.nccl_unique_id(nccl_candidates())
    except PipeliveError as error:
        link.send({"ok": False, "why": str(error)})
        return _fall_back(setup, peer, str(error))
    seconds = _NCCL_SHARE * max(0.0, ends_at - time.monotonic())
    link.send({"ok": True, "id": unique.hex(), "seconds": seconds})
    return _bring_up(setup, link, unique, 0, peer, seconds)


def set_up_target(
    connected: socket.socket,
    device: Any,
    own: Abilities,
    peer: Abilities,
    base: str,
    ends_at: float,
) -> Setup:
    """The listening end's half."""
    path, why = choose(peer, own, base)
    if path == "host":
        return Setup("host", why)
    setup = Setup(path, why, device)
    link = _Frames(connected, ends_at)
    said, fds = link.receive_with_fds()
    try:
        if not said.get("ok"):
            return _fall_back(setup, own, f"the source: {said.get('why')}")
        if path == "p2p":
            said_of = (said.get(name) for name in ("offset", "nbytes", "piece_bytes", "pieces"))
            # The core takes unsigned numbers, `pieces` of 32 bits; what it says of them is its own.
            shape = [n for n in said_of if type(n) is int and 0 <= n < 1 << 40]
            if len(fds) != 1 or len(shape) != 4 or shape[3] > _MOST_PIECES:
                raise ProtocolError(
                    "the source's staging: no descriptor, or no sizes, came with it"
                )
            try:
                setup.peer = _core.PeerStaging(device, fds.pop(), *shape)
            except PipeliveError as error:
                link.send({"ok": False, "why": str(error)})
                return _fall_back(setup, own, f"the target cannot map it: {error}")
            link.send({"ok": True})
            if setup.peer.writable:
                setup.why += "; this driver maps the source's staging writable"
            return setup
    finally:
        for fd in fds:
            os.close(fd)
    try:
        unique = bytes.fromhex(str(said.get("id")))
    except ValueError:
        raise ProtocolError("the source's NCCL id is no hexadecimal number") from None
    seconds = _NCCL_SHARE * max(0.0, ends_at - time.monotonic())
    said_seconds = said.get("seconds")
    if isinstance(said_seconds, (int, float)) and not isinstance(said_seconds, bool):
        seconds = max(0.0, min(seconds, said_seconds))  # who connects mostly has less time
    return _bring_up(setup, link, unique, 1, own, seconds)


def _bring_up(
    setup: Setup, link: _Frames, unique: bytes, rank: int, target: Abilities, seconds: float
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


def _first_transfer(setup: Setup, link: _Frames, rank: int, until: float) -> str:
    """Transfer both ways; NCCL connects only then. Why it failed, at either end; empty if not.

    Both devices' turns are in hand meanwhile. They are tried for, and given back where the other
    end did not get its own.
    """
    name, _, _ = _core.device_identity(setup.device)
    turn = _core.DeviceTurn(name)
    ends_at = link.ends_at
    while True:
        why = ""
        if time.monotonic() >= until:
            why = f"the devices' turns were not free together; here {turn.holder or 'nobody'}"
        mine: bool = not why and turn.try_take("NCCL's first transfer")
        try:
            link.ends_at = min(ends_at, time.monotonic() + _TURN_SECONDS)
            why, theirs = _round(link, why, mine)
            link.ends_at = ends_at
            if why:
                return why
            if mine and theirs:
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


def _round(link: _Frames, why: str, turn: bool = False) -> tuple[str, bool]:
    """Say how it went here; why it cannot go on, and whether the other end has its turn."""
    link.send({"ok": not why, "why": why[:4000], "turn": turn})
    answer = link.receive()
    if not why and not answer.get("ok"):
        why = f"the other end: {answer.get('why')}"
    return why, answer.get("turn") is True


def _fall_back(setup: Setup, target: Abilities, why: str) -> Setup:
    if target.want != "auto":
        raise HelloMismatchError(f"{setup.path} was asked for, but could not be set up: {why}")
    return Setup("host", f"{setup.path} could not be set up: {why}")


class _Frames:
    """JSON objects behind their length, over a socket that may block until ``ends_at``."""

    def __init__(self, connected: socket.socket, ends_at: float) -> None:
        self._socket = connected
        self.ends_at = ends_at

    def fileno(self) -> int:
        """The socket's; readable once the peer has said more, or has gone."""
        return self._socket.fileno()

    def send(self, content: Mapping[str, Any], fd: int | None = None) -> None:
        body = json.dumps(content).encode()
        data = _LENGTH.pack(len(body)) + body
        with self._patiently():
            if fd is not None:
                # The descriptor goes with the first byte, so that it cannot come apart from it.
                socket.send_fds(self._socket, [data[:1]], [fd])
                data = data[1:]
            self._socket.sendall(data)

    def receive(self) -> dict[str, Any]:
        content, fds = self.receive_with_fds()
        for fd in fds:
            os.close(fd)
        return content

    def receive_with_fds(self) -> tuple[dict[str, Any], list[int]]:
        fds: list[int] = []
        try:
            (size,) = _LENGTH.unpack(self._exactly(_LENGTH.size, fds))
            if not 0 < size <= _MAX_FRAME_BYTES:
                raise ProtocolError(f"a frame of {size} bytes while setting up")
            try:
                content = json.loads(self._exactly(size, fds))
            except (ValueError, RecursionError) as error:
                raise ProtocolError(f"a frame while setting up is no JSON: {error}") from None
            if not isinstance(content, dict):
                raise ProtocolError("a frame while setting up is no JSON object")
        except BaseException:
            for fd in fds:
                os.close(fd)
            raise
        return content, fds

    def _exactly(self, size: int, fds: list[int]) -> bytes:
        data = bytearray()
        with self._patiently():
            while len(data) < size:
                self._socket.settimeout(self._rest())
                if self._socket.family == socket.AF_UNIX:
                    piece, more, _, _ = socket.recv_fds(self._socket, size - len(data), 4)
                    fds += more
                    if len(fds) > _MOST_DESCRIPTORS:
                        raise ProtocolError(f"{len(fds)} descriptors came while setting up")
                else:
                    piece = self._socket.recv(size - len(data))
                if not piece:
                    raise ClosedError("the peer hung up while the path was set up")
                data += piece
        return bytes(data)

    def _rest(self) -> float:
        rest = self.ends_at - time.monotonic()
        if rest <= 0:
            raise DeadlineError("the peer did not finish setting up the path in time")
        return rest

    @contextlib.contextmanager
    def _patiently(self) -> Any:
        try:
            self._socket.settimeout(self._rest())
            yield
        except PipeliveError:
            raise
        except TimeoutError as error:
            raise DeadlineError("the peer did not finish setting up the path in time") from error
        except OSError as error:
            raise ClosedError(f"the peer hung up while the path was set up: {error}") from error

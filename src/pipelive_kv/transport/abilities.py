"""What both ends of a connection can do, and which path for payloads follows from that.

Both ends say it in their hello (fields that begin with ``transport.``), and both reckon from the
two hellos what is taken, so nothing has to be agreed on.
"""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pipelive_kv import _core
from pipelive_kv.transport.handshake import HelloMismatchError
from pipelive_kv.transport.nccl import nccl_probe

PREFIX = "transport."

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


def choose(
    source: Abilities, target: Abilities, base: str, *, p2p_failed: str = ""
) -> tuple[Path, str]:
    """The path that both ends take over a connection of kind ``base``, and why.

    ``source`` is the connecting end, ``target`` the listening one; ``p2p_failed`` says why P2P,
    which both ends could do by what they say, was tried in vain. Raises ProtocolError, at both
    ends, where the one path that is wanted cannot be taken.
    """
    want = target.want
    if want in ("shm", "tcp", "host"):
        return "host", f"the listener takes nothing but {want}"
    no_p2p = p2p_failed or _no_p2p(source, target, base)
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

"""What runs inside a stage process: it breaks things on command and counts what is held."""

from __future__ import annotations

import contextlib
import gc
import os
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import zmq

from pipelive_kv import _core
from pipelive_kv.errors import PipeliveError
from pipelive_kv.stage import EngineHooks
from pipelive_kv.transport.address import Address

from .proxy import FaultProxy, WireFault

HOOKS = ("prepare", "warmup", "discard", "retire")


class Command(msgspec.Struct, frozen=True):
    """What the suite asks of a stage; only the fields of ``do`` count.

    do: ``wire`` (break the outgoing connection, now or as soon as there is one), ``device`` (fail
    the ``nth`` call), ``hook`` (raise in the next call of it), ``calm`` (undo what has not
    struck), ``inspect``.
    """

    do: str
    wire: WireFault | None = None
    call: str = ""
    nth: int = 1
    hook: str = ""


class Held(msgspec.Struct, frozen=True):
    """What a stage process holds that could leak, and whether the fault has struck."""

    pid: int
    fds: dict[str, int]
    threads: tuple[str, ...]
    mappings: int
    rss_bytes: int
    used_bytes: int
    struck: bool


class Agent:
    """Given to the engine as ``wrap_hooks``; its arrival in a stage process installs it there."""

    def __init__(self, directory: str) -> None:
        self._directory = directory

    def __reduce__(self) -> tuple[Any, ...]:
        return _arrive, (self._directory,)

    def __call__(self, hooks: EngineHooks, pool: Any) -> EngineHooks:
        raise RuntimeError("the agent works in stage processes only")


def _arrive(directory: str) -> Any:
    return _Installed(directory) if _in_stage() else Agent(directory)


def _in_stage() -> bool:
    import multiprocessing

    return multiprocessing.current_process().name.startswith("pipelive-stage-")


class _Installed:
    """Before the pool is made: memory from a device that can fail, connections over a proxy."""

    def __init__(self, directory: str) -> None:
        from pipelive_kv import memory
        from pipelive_kv.stage import service

        self._directory = directory
        self.device = _core.FaultDevice(_core.HostDevice())
        memory.open_device = lambda _: self.device  # type: ignore[assignment]
        self._connect = service.connect
        service.connect = self.connect
        self._lock = threading.Lock()
        self._proxies: list[FaultProxy] = []
        self._next: WireFault | None = None
        self._struck = False
        self.failing = ""

    def __call__(self, hooks: EngineHooks, pool: Any) -> EngineHooks:
        self._pool = pool
        threading.Thread(target=self._serve, name="chaos-agent", daemon=True).start()
        return _FailingHooks(hooks, self)

    def connect(self, address: str, **more: Any) -> Any:
        """In place of the library's: over a proxy where the address is of TCP."""
        parsed = Address.parse(address)
        if parsed.kind != "tcp":
            return self._connect(address, **more)
        proxy = FaultProxy(parsed.tcp)
        with self._lock:
            self._proxies = [known for known in self._proxies if not known.is_over]
            self._proxies.append(proxy)
            if self._next is not None:
                proxy.arm(self._next)
                self._next = None
        return self._connect(f"tcp://{proxy.address[0]}:{proxy.address[1]}", **more)

    def strike(self, name: str) -> None:
        """Raise if the hook ``name`` is to fail now."""
        with self._lock:
            if self.failing != name:
                return
            self.failing, self._struck = "", True
        raise RuntimeError(f"chaos: {name} fails")

    # -- the suite's commands ------------------------------------------------------------------

    def _serve(self) -> None:
        context = zmq.Context()
        socket = context.socket(zmq.REP)
        name = f"agent-{os.getpid()}"
        socket.bind(f"ipc://{self._directory}/{name}")
        decoder, encoder = msgspec.json.Decoder(Command), msgspec.json.Encoder()
        (Path(self._directory) / f"{name}.ready").touch()
        while True:
            socket.send(encoder.encode(self._answer(decoder.decode(socket.recv()))))

    def _answer(self, command: Command) -> Held:
        match command.do:
            case "wire":
                self._break_wire(command.wire)
            case "device":
                self.device.fail(command.call, command.nth)
            case "hook":
                self.failing = command.hook
            case "calm":
                self._calm()
            case "inspect":
                pass
            case _:
                raise ValueError(command.do)
        return self._held()

    def _break_wire(self, fault: WireFault | None) -> None:
        if fault is None:
            raise ValueError("no fault")
        with self._lock:
            open_ones = [proxy for proxy in self._proxies if not proxy.is_over]
            if not open_ones:
                self._next = fault
            for proxy in open_ones:
                proxy.arm(fault)

    def _calm(self) -> None:
        with self._lock:
            proxies, self._proxies = self._proxies, []
            self._next, self.failing, self._struck = None, "", False
        self.device.disarm()
        for proxy in proxies:
            proxy.close()

    def _held(self) -> Held:
        # Errors that are kept hold on to their channels in cycles; that is no leak.
        gc.collect()
        with self._lock:
            struck = self._struck or any(proxy.struck for proxy in self._proxies)
        maps = Path("/proc/self/maps").read_text(encoding="ascii").count("\n")
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
        return Held(
            pid=os.getpid(),
            fds=_descriptors(),
            threads=tuple(sorted(thread.name for thread in threading.enumerate())),
            mappings=maps,
            rss_bytes=pages * os.sysconf("SC_PAGE_SIZE"),
            used_bytes=self._pool.page_pool.stats().used_bytes,
            struck=struck,
        )


def _descriptors() -> dict[str, int]:
    """How many of which kind: sockets, pipes, files by name."""
    found: dict[str, int] = {}
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # the one that lists them has gone
            kind = os.readlink(f"/proc/self/fd/{name}").split(":[")[0]
            found[kind] = found.get(kind, 0) + 1
    return found


class _FailingHooks(EngineHooks):
    """The engine's hooks; one of them raises when it is told to."""

    def __init__(self, hooks: EngineHooks, installed: _Installed) -> None:
        self._hooks = hooks
        self._installed = installed

    def prepare(self, layers: Sequence[int], arena: Any) -> None:
        self._installed.strike("prepare")
        self._hooks.prepare(layers, arena)

    def warmup(self, placement: Any) -> None:
        self._installed.strike("warmup")
        self._hooks.warmup(placement)

    def activate(self, placement: Any) -> None:
        self._hooks.activate(placement)

    def discard(self, layers: Sequence[int]) -> None:
        self._hooks.discard(layers)
        self._installed.strike("discard")

    def retire(self, layers: Sequence[int]) -> None:
        self._hooks.retire(layers)
        self._installed.strike("retire")


class Agents:
    """The suite's side: one connection to each stage's agent."""

    def __init__(self, directory: str, pids: Sequence[int], timeout: float = 60.0) -> None:
        self._context = zmq.Context()
        self._sockets = []
        end = time.monotonic() + timeout
        for pid in pids:
            ready = Path(directory) / f"agent-{pid}.ready"
            while not ready.exists():
                if time.monotonic() > end:
                    raise PipeliveError(f"the agent of process {pid} did not come up")
                time.sleep(0.01)
            socket = self._context.socket(zmq.REQ)
            socket.setsockopt(zmq.LINGER, 0)
            socket.setsockopt(zmq.RCVTIMEO, 30_000)
            socket.connect(f"ipc://{directory}/agent-{pid}")
            self._sockets.append(socket)

    def ask(self, rank: int, command: Command) -> Held:
        """Have a stage do something; raises where it does not answer."""
        socket = self._sockets[rank]
        try:
            socket.send(msgspec.json.encode(command))
            answer = socket.recv()
        except zmq.ZMQError as error:
            raise PipeliveError(f"the agent of stage {rank} does not answer: {error}") from None
        return msgspec.json.decode(answer, type=Held)

    def ask_all(self, command: Command) -> list[Held]:
        """Have every stage do something."""
        return [self.ask(rank, command) for rank in range(len(self._sockets))]

    def close(self) -> None:
        """Close the connections."""
        for socket in self._sockets:
            socket.close()
        self._context.term()

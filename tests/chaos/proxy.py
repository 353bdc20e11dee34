"""A relay between the ends of a patch connection that breaks what passes, once, on command."""

from __future__ import annotations

import contextlib
import random
import socket
import struct
import threading
from dataclasses import dataclass

KINDS = (
    "close",  # both directions at once, in good order
    "reset",  # both directions at once, by RST
    "half_close",  # one direction ends, the other goes on
    "swallow",  # nothing passes any more, and nobody is told
    "drop",  # some bytes are missing
    "duplicate",  # some bytes come twice
    "garbage",  # some bytes come from nowhere
    "flip",  # one bit is another
    "delay",  # nothing passes for a while, then all does
    "drip",  # a few bytes at a time
)
CHUNK = 64 << 10


@dataclass(frozen=True)
class WireFault:
    """What happens to one direction of one connection.

    Attributes:
        kind: one of KINDS.
        forward: from the source of the move to its target (data), or back (acknowledgements).
        after: begins after so many bytes of that direction.
        size: bytes that are dropped, repeated, invented or let through at a time.
        seconds: of a delay, or between two drips.
        seed: for garbage and the flipped bit.
    """

    kind: str
    forward: bool = True
    after: int = 0
    size: int = 1
    seconds: float = 0.0
    seed: int = 0


class FaultProxy:
    """Listens on a loopback port and relays its first connection to ``target``.

    Without a fault it relays faithfully; :meth:`arm` sets the fault, which then strikes once.
    """

    def __init__(self, target: tuple[str, int]) -> None:
        self._target = target
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.address: tuple[str, int] = self._listening.getsockname()[:2]
        self._lock = threading.Lock()
        self._fault: WireFault | None = None
        self._passed = {True: 0, False: 0}
        self.struck = False
        self._over = threading.Event()
        self._sockets: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._accept, name="chaos-accept", daemon=True)]
        self._threads[0].start()

    def arm(self, fault: WireFault) -> None:
        """``fault.after`` counts from now."""
        with self._lock:
            self._fault = fault
            self._passed = {True: 0, False: 0}

    def close(self) -> None:
        """End the relay and wait for its threads."""
        self._over.set()
        self._shut(self._listening)
        for end in tuple(self._sockets):
            self._shut(end)
        for thread in tuple(self._threads):
            thread.join(timeout=10)

    @property
    def is_over(self) -> bool:
        """Whether both ends have gone."""
        return not any(thread.is_alive() for thread in self._threads)

    def _accept(self) -> None:
        try:
            source, _ = self._listening.accept()
            self._sockets.append(source)
            target = socket.create_connection(self._target, timeout=10)
            target.settimeout(None)
            self._sockets.append(target)
        except OSError:
            for end in self._sockets:
                self._shut(end)
            return
        finally:
            self._listening.close()
        for forward, a, b in ((True, source, target), (False, target, source)):
            thread = threading.Thread(
                target=self._relay, args=(forward, a, b), name="chaos-relay", daemon=True
            )
            self._threads.append(thread)
            thread.start()
        for thread in self._threads[1:]:
            thread.join()
        for end in self._sockets:
            end.close()

    def _relay(self, forward: bool, source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(CHUNK):
                if not self._pass(forward, data, target):
                    break
            target.shutdown(socket.SHUT_WR)

    def _pass(self, forward: bool, data: bytes, target: socket.socket) -> bool:
        """Pass ``data`` on, or what the fault makes of it; False where that direction is over."""
        with self._lock:
            fault = self._fault
            if fault is None or fault.forward != forward or self.struck:
                fault = None
            else:
                before = self._passed[forward]
                self._passed[forward] += len(data)
                if before + len(data) <= fault.after:
                    fault = None
                else:
                    at = fault.after - before
                    self.struck = True
        if fault is None:
            target.sendall(data)
            return True
        target.sendall(data[:at])
        return self._strike(fault, data[at:], target)

    def _strike(self, fault: WireFault, data: bytes, target: socket.socket) -> bool:
        dice = random.Random(fault.seed)
        match fault.kind:
            case "close":
                for end in self._sockets:
                    self._shut(end)
                return False
            case "reset":
                for end in self._sockets:
                    end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    # Shutting down first would end the connection in good order.
                    end.close()
                return False
            case "half_close":
                return False
            case "swallow":
                self._over.wait()
                return False
            case "drop":
                data = data[fault.size :]
            case "duplicate":
                data = data[: fault.size] + data
            case "garbage":
                data = dice.randbytes(fault.size) + data
            case "flip":
                broken = bytearray(data)
                broken[dice.randrange(min(len(broken), fault.size))] ^= 1 << dice.randrange(8)
                data = bytes(broken)
            case "delay":
                self._over.wait(fault.seconds)
            case "drip":
                for start in range(0, len(data), fault.size):
                    target.sendall(data[start : start + fault.size])
                    if self._over.wait(fault.seconds):
                        return False
                return True
            case _:
                raise ValueError(fault.kind)
        target.sendall(data)
        return True

    @staticmethod
    def _shut(end: socket.socket) -> None:
        with contextlib.suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)

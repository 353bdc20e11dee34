"""What a process listens on, and strangers who connect to it."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import random
import socket
import struct
import threading


def socket_inodes(pid: int | str = "self") -> set[int]:
    """The inodes of all sockets that a process has open."""
    inodes = set()
    for fd in os.listdir(f"/proc/{pid}/fd"):
        try:
            link = os.readlink(f"/proc/{pid}/fd/{fd}")
        except OSError:
            continue  # closed since it was listed
        if link.startswith("socket:["):
            inodes.add(int(link[8:-1]))
    return inodes


def _address(text: str) -> tuple[str, int]:
    host, port = text.split(":")
    # Each group of four bytes is printed as one number of the host, which is little-endian.
    words = [int(host[at : at + 8], 16) for at in range(0, len(host), 8)]
    return str(ipaddress.ip_address(struct.pack(f"<{len(words)}I", *words))), int(port, 16)


def listening(pid: int | str = "self") -> list[tuple[str, int]]:
    """Host and port of every TCP socket that a process listens on."""
    inodes = socket_inodes(pid)
    found = []
    for table in ("tcp", "tcp6"):
        with open(f"/proc/{pid}/net/{table}", encoding="ascii") as lines:
            next(lines)
            for line in lines:
                fields = line.split()
                if fields[3] == "0A" and int(fields[9]) in inodes:
                    found.append(_address(fields[1]))
    return found


def bound_udp(pid: int | str = "self") -> list[tuple[str, int]]:
    """The same of UDP sockets."""
    inodes = socket_inodes(pid)
    found = []
    for table in ("udp", "udp6"):
        with open(f"/proc/{pid}/net/{table}", encoding="ascii") as lines:
            next(lines)
            found += [_address(f[1]) for f in map(str.split, lines) if int(f[9]) in inodes]
    return found


def abstract_listeners(pid: int | str = "self") -> list[str]:
    """The abstract Unix sockets that a process listens on, with ``@`` in front."""
    inodes = socket_inodes(pid)
    found = []
    with open(f"/proc/{pid}/net/unix", encoding="utf-8", errors="replace") as lines:
        next(lines)
        for line in lines:
            fields = line.split()
            # Flag 0x10000 is __SO_ACCEPTCON.
            listens = int(fields[3], 16) & 0x10000
            if listens and len(fields) > 7 and int(fields[6]) in inodes:
                found.append(fields[7])
    return [name for name in found if name.startswith("@")]


def await_hang_up(connected: socket.socket) -> None:
    """Read until the other end has closed; what it has not read makes that a reset."""
    with contextlib.suppress(ConnectionResetError):
        while connected.recv(65536):
            pass


class Scanner:
    """Connects to whatever this process listens on, over and over, until it is closed.

    Some connections are dropped at once, some say garbage first, a few are held and say nothing.
    """

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self._stop = threading.Event()
        self.connections = 0
        self.ports: set[int] = set()
        self.names: set[str] = set()
        self._held: list[socket.socket] = []
        self._thread = threading.Thread(target=self._scan, name="scanner")

    def __enter__(self) -> Scanner:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(timeout=60)
        for connected in self._held:
            connected.close()

    def _scan(self) -> None:
        # Waits between two scans, so that a machine with one core has time for the rest.
        while not self._stop.wait(0.005):
            for host, port in listening():
                self.ports.add(port)
                self._knock(socket.AF_INET, (host, port))
            for name in abstract_listeners():
                self.names.add(name)
                self._knock(socket.AF_UNIX, "\0" + name[1:])

    def _knock(self, family: socket.AddressFamily, address: object) -> None:
        connected = socket.socket(family, socket.SOCK_STREAM)
        connected.setblocking(False)
        try:
            connected.connect_ex(address)  # type: ignore[arg-type]
            self.connections += 1
            choice = self._random.random()
            if choice < 0.4:
                connected.send(self._random.randbytes(self._random.randrange(1, 300)))
            elif choice < 0.5:
                self._held.append(connected)
                if len(self._held) <= 20:
                    return
                connected = self._held.pop(0)
        except OSError:
            pass  # nobody there any more, or nothing taken yet
        connected.close()


class Recorder:
    """Stands between two ends of a TCP connection and keeps what goes through it."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._server = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._server.getsockname()[1]
        self.from_client = bytearray()
        self.from_server = bytearray()
        self._ends: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def _accept(self) -> None:
        client, _ = self._server.accept()
        server = socket.create_connection(("127.0.0.1", self._port))
        self._ends += [client, server]
        back = threading.Thread(target=self._pass, args=(server, client, self.from_server))
        back.start()
        self._threads.append(back)
        self._pass(client, server, self.from_client)

    @staticmethod
    def _pass(source: socket.socket, target: socket.socket, kept: bytearray) -> None:
        try:
            while piece := source.recv(65536):
                kept += piece
                target.sendall(piece)
            target.shutdown(socket.SHUT_WR)
        except OSError:
            return  # an end has gone, which the other sees when the recorder is closed

    def close(self) -> None:
        for end in (self._server, *self._ends):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()
        for thread in self._threads:
            thread.join(timeout=60)

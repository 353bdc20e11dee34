"""Addresses of patch listeners, as text that travels in control messages.

``tcp://127.0.0.1:40001`` and ``shm://@name`` (an abstract Unix socket) or ``shm:///path``; and
``auto://127.0.0.1:40001?host=BOOT_ID&shm=@name``, which offers both and says on which host the
second can be reached.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from urllib.parse import parse_qs, quote, urlsplit

from pipelive_kv.errors import InvalidArgumentError


@dataclass(frozen=True)
class Address:
    """Where a listener can be reached: over TCP, over shared memory, or over both."""

    host: str = ""
    port: int = 0
    path: str = ""
    """Of the Unix socket; ``@`` in front stands for an abstract one."""
    boot_id: str = ""

    @property
    def kind(self) -> str:
        """``"tcp"``, ``"shm"`` or ``"auto"``."""
        if self.path and self.host:
            return "auto"
        return "shm" if self.path else "tcp"

    @property
    def tcp(self) -> tuple[str, int]:
        """What a TCP socket connects to."""
        return self.host, self.port

    @property
    def unix(self) -> str:
        """What a Unix socket connects to."""
        return "\0" + self.path[1:] if self.path.startswith("@") else self.path

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        if self.kind == "tcp":
            return f"tcp://{host}:{self.port}"
        if self.kind == "shm":
            return f"shm://{self.path}"
        return f"auto://{host}:{self.port}?host={quote(self.boot_id)}&shm={quote(self.path)}"

    @classmethod
    def parse(cls, text: str) -> Address:
        """The inverse of ``str``; raises InvalidArgumentError naming the address."""
        error = InvalidArgumentError(
            f"address is {text!r}, expected tcp://HOST:PORT, shm://@NAME, shm:///PATH or auto://..."
        )
        if not isinstance(text, str):
            raise error
        try:
            scheme, rest = text.split("://", 1)
            if scheme == "shm":
                if len(rest) < 2 or rest[0] not in "@/" or "\0" in rest:
                    raise error
                return cls(path=rest)
            parts = urlsplit(text)
            if scheme not in ("tcp", "auto") or not parts.hostname or not parts.port:
                raise error
            # urlsplit takes more than is meant here, and drops some of it without a word.
            if "@" in parts.netloc or parts.path or parts.fragment or not text.isprintable():
                raise error
            if scheme == "tcp" and parts.query:
                raise error
            if scheme == "tcp":
                return cls(parts.hostname, parts.port)
            query = parse_qs(parts.query, strict_parsing=True)
            path, boot_id = query["shm"][0], query["host"][0]
        except (ValueError, KeyError, AttributeError):
            raise error from None
        if len(path) < 2 or path[0] not in "@/" or "\0" in path:
            raise error
        return cls(parts.hostname, parts.port, path, boot_id)


def boot_id() -> str:
    """What tells this running system from every other; empty where it cannot be read."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return ""

"""Where the control plane meets, and the key that lets a process take part."""

from __future__ import annotations

import ipaddress
import os
import secrets
import stat
from dataclasses import dataclass, field

import msgspec
import zmq

from pipelive_kv.errors import InvalidArgumentError

_MAX_KEY_FILE_BYTES = 16 << 10


class _KeyFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    server_public: str
    server_secret: str
    client_public: str
    client_secret: str
    patch_secret: str


@dataclass(frozen=True)
class ControlKey:
    """What every process of one pipeline shares and nobody else has.

    The control sockets use CURVE (https://rfc.zeromq.org/spec/26): both ends prove that they hold
    their half, and every message is encrypted and authenticated. ``patch_secret`` keys the mutual
    challenge of the patch connections.
    """

    server_public: bytes = field(repr=False)
    server_secret: bytes = field(repr=False)
    client_public: bytes = field(repr=False)
    client_secret: bytes = field(repr=False)
    patch_secret: bytes = field(repr=False)

    @classmethod
    def generate(cls) -> ControlKey:
        """A new random key.

        Raises:
            InvalidArgumentError: the installed libzmq was built without CURVE.
        """
        if not zmq.has("curve"):
            raise InvalidArgumentError(
                f"libzmq {zmq.zmq_version()} was built without CURVE, which the control plane needs"
            )
        server_public, server_secret = zmq.curve_keypair()
        client_public, client_secret = zmq.curve_keypair()
        return cls(
            server_public, server_secret, client_public, client_secret, secrets.token_bytes(32)
        )

    def to_bytes(self) -> bytes:
        """The key as JSON, to hand to a child process over a private channel."""
        return msgspec.json.encode(
            _KeyFile(
                self.server_public.decode(),
                self.server_secret.decode(),
                self.client_public.decode(),
                self.client_secret.decode(),
                self.patch_secret.hex(),
            )
        )

    @classmethod
    def from_bytes(cls, content: bytes) -> ControlKey:
        """The key that :meth:`to_bytes` wrote.

        Raises:
            InvalidArgumentError: the content is not a key.
        """
        try:
            data = msgspec.json.decode(content, type=_KeyFile)
            patch_secret = bytes.fromhex(data.patch_secret)
        except (msgspec.DecodeError, ValueError) as error:
            raise InvalidArgumentError(f"the content is not a control key: {error}") from error
        z85 = (data.server_public, data.server_secret, data.client_public, data.client_secret)
        if any(len(part) != 40 for part in z85) or len(patch_secret) != 32:
            raise InvalidArgumentError(
                "the content is not a control key: a part is of wrong length"
            )
        if any(not part.isascii() for part in z85):
            raise InvalidArgumentError("the content is not a control key: a part is no Z85 text")
        server_public, server_secret, client_public, client_secret = (p.encode() for p in z85)
        for public, secret in ((server_public, server_secret), (client_public, client_secret)):
            if _public_of(secret) != public:
                raise InvalidArgumentError(
                    "the content is not a control key: a public part is not that of its secret"
                )
        return cls(server_public, server_secret, client_public, client_secret, patch_secret)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the key to a new file that only its owner can read."""
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(handle, "wb") as file:
            file.write(self.to_bytes())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> ControlKey:
        """Read a key file.

        Raises:
            InvalidArgumentError: others than the owner can read the file, or it is not a key.
            OSError: the file cannot be read.
        """
        # Looked at once it is open: what a name stands for can change in between.
        with open(path, "rb") as file:
            status = os.fstat(file.fileno())
            mode = stat.S_IMODE(status.st_mode)
            if not stat.S_ISREG(status.st_mode) or mode & 0o077:
                raise InvalidArgumentError(
                    f"key file {path} has mode {mode:04o}, expected 0600: others could read it"
                )
            if status.st_uid not in (0, os.geteuid()):
                raise InvalidArgumentError(
                    f"key file {path} belongs to user {status.st_uid}, expected "
                    f"{os.geteuid()}: its owner could change it"
                )
            return cls.from_bytes(file.read(_MAX_KEY_FILE_BYTES))


@dataclass(frozen=True)
class ControlEndpoint:
    """The address at which the coordinator listens, and the key.

    Attributes:
        address: ``tcp://host:port``, ``tcp://host:*`` for a free port, or ``ipc:///path``.
        key: what every participant shares.
        allow_remote: a TCP host other than a loopback address is refused unless this is set.

    Raises:
        InvalidArgumentError: the address is of another form, or not a loopback address.
    """

    address: str
    key: ControlKey
    allow_remote: bool = False

    def __post_init__(self) -> None:
        if self.address.startswith("ipc://") and len(self.address) > len("ipc://"):
            return
        host, separator, port = self.address.removeprefix("tcp://").rpartition(":")
        if not self.address.startswith("tcp://") or not separator or not host:
            raise InvalidArgumentError(
                f"control address is {self.address!r}, expected tcp://host:port or ipc:///path"
            )
        if port != "*" and not (port.isdigit() and 0 < int(port) < 65536):
            raise InvalidArgumentError(
                f"control address is {self.address!r}, expected a port of 1 to 65535 or *"
            )
        if not self.allow_remote and not _is_loopback(host):
            raise InvalidArgumentError(
                f"control address is {self.address!r}, which others can reach; expected a loopback "
                "address, or allow_remote=True"
            )


def _public_of(secret: bytes) -> bytes:
    try:
        return zmq.curve_public(secret)
    except (zmq.ZMQError, ValueError):
        return b""


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False

"""The coordinator's end of the control plane."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from typing import TypeVar

import zmq
import zmq.auth.thread

from pipelive_kv.control import wire
from pipelive_kv.control.endpoint import ControlEndpoint
from pipelive_kv.control.loop import SocketLoop
from pipelive_kv.errors import ClosedError, DeadlineError, ProtocolError
from pipelive_kv.messages import Answer, Request

_log = logging.getLogger(__name__)
_A = TypeVar("_A")

_CHECK_EVERY = 0.05
"""Seconds between two looks at whether the caller still wants the answer."""


_PROBE_EVERY = 0.1
"""Seconds between two looks at whether a participant is still connected."""


class _OnlyOurClients:
    """Accepts the client key of the endpoint and no other (a zmq credentials provider)."""

    def __init__(self, public: bytes) -> None:
        self._allowed = public

    def callback(self, domain: str, key: bytes) -> bool:
        # zmq hands over the key in its text form.
        return key == self._allowed


@dataclass
class _Peer:
    identity: bytes
    pending: dict[int, Future[Answer]] = field(default_factory=dict)


class ControlServer:
    """Listens at the endpoint, learns who takes part, and sends them requests."""

    def __init__(self, endpoint: ControlEndpoint) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._lock = threading.Condition()
        self._peers: dict[str, _Peer] = {}
        self._names: dict[bytes, str] = {}
        self._next_number = 1
        self._closed = False
        self._authenticator = zmq.auth.thread.ThreadAuthenticator(self._context)
        self._authenticator.start()
        try:
            self._authenticator.configure_curve_callback(
                credentials_provider=_OnlyOurClients(endpoint.key.client_public)
            )
            self._loop = SocketLoop(
                "pipelive-control-server",
                lambda: self._bind(endpoint),
                self._on_message,
                self._probe,
                _PROBE_EVERY,
                on_unsent=self._on_gone,
            )
        except BaseException:
            self._authenticator.stop()
            self._context.destroy(linger=0)
            raise
        self.endpoint = ControlEndpoint(self._bound, endpoint.key, endpoint.allow_remote)

    def _bind(self, endpoint: ControlEndpoint) -> zmq.Socket[bytes]:
        router = self._context.socket(zmq.ROUTER)
        try:
            router.curve_server = True
            router.curve_secretkey = endpoint.key.server_secret
            router.curve_publickey = endpoint.key.server_public
            wire.limit(router)
            router.router_mandatory = True
            # A participant that was restarted under its name takes the place of the old one.
            router.router_handover = True
            router.bind(endpoint.address)
            self._bound = str(router.getsockopt_string(zmq.LAST_ENDPOINT)).rstrip("\0")
        except zmq.ZMQError as error:
            router.close(linger=0)
            raise ClosedError(
                f"cannot listen at control address {endpoint.address!r}: {error}"
            ) from error
        return router

    def await_participants(self, names: list[str], timeout: float) -> None:
        """Wait until all of ``names`` have announced themselves.

        Raises:
            DeadlineError: naming who has not.
        """
        end = time.monotonic() + timeout
        with self._lock:
            while True:
                missing = [name for name in names if name not in self._peers]
                if not missing:
                    return
                rest = end - time.monotonic()
                if rest <= 0 or self._closed:
                    raise DeadlineError(
                        f"no word from {', '.join(missing)} within {timeout:g} s at "
                        f"{self.endpoint.address}"
                    )
                self._lock.wait(rest)

    def await_loss(self, names: Iterable[str], timeout: float) -> None:
        """Wait until one of ``names`` is known to have gone, or for ``timeout`` seconds."""
        end = time.monotonic() + timeout
        with self._lock:
            while not self._closed and all(name in self._peers for name in names):
                rest = end - time.monotonic()
                if rest <= 0:
                    return
                self._lock.wait(rest)

    def is_connected(self, name: str) -> bool:
        """Whether ``name`` has announced itself and has not gone since."""
        with self._lock:
            return name in self._peers

    def start(self, name: str, body: Request) -> Future[Answer]:
        """Send a request to the participant ``name``; the future holds its answer."""
        future: Future[Answer] = Future()
        with self._lock:
            peer = self._peers.get(name)
            if self._closed or peer is None:
                why = "the control server is closed" if self._closed else f"{name} is not connected"
                future.set_exception(ClosedError(f"{type(body).__name__}: {why}"))
                return future
            number = self._next_number
            self._next_number += 1
            peer.pending[number] = future
            identity = peer.identity
        self._loop.send([identity, wire.encode(wire.Call(number, body))])
        return future

    def finish(
        self,
        name: str,
        body: Request,
        future: Future[Answer],
        kind: type[_A],
        timeout: float,
        check: Callable[[], object] | None = None,
    ) -> _A:
        """Wait for the answer of a request that :meth:`start` sent.

        ``check`` is called now and then while it waits, and ends the wait by raising.

        Raises:
            DeadlineError: ``name`` did not answer within ``timeout`` seconds.
            ProtocolError: the answer is of another kind than ``kind``.
            PipeliveError: what the participant raised, its name in front of the message.
        """
        end = time.monotonic() + timeout
        while not wait([future], max(0.0, min(_CHECK_EVERY, end - time.monotonic()))).done:
            if check is not None:
                check()
            if time.monotonic() >= end:
                raise DeadlineError(
                    f"{name} did not answer {type(body).__name__} within {timeout:.1f} s"
                )
        answer = future.result()
        if not isinstance(answer, kind):
            raise ProtocolError(
                f"{name} answered {type(body).__name__} with {type(answer).__name__}, expected "
                f"{kind.__name__}"
            )
        return answer

    def call(self, name: str, body: Request, kind: type[_A], timeout: float) -> _A:
        """Send a request and wait for its answer; raises as :meth:`finish` does."""
        return self.finish(name, body, self.start(name, body), kind, timeout)

    def close(self) -> None:
        """Close the socket; everybody who waits gets ClosedError."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            waiting = [f for peer in self._peers.values() for f in peer.pending.values()]
            self._lock.notify_all()
        for future in waiting:
            if not future.done():
                future.set_exception(ClosedError("the control server was closed"))
        self._loop.close()
        self._authenticator.stop()
        self._context.destroy(linger=200)

    def _probe(self) -> None:
        """Say something to everybody: to a connection that has ended it cannot be said."""
        with self._lock:
            known = [peer.identity for peer in self._peers.values()]
        for identity in known:
            self._loop.send([identity, wire.encode(wire.Welcome())])

    def _on_gone(self, identity: bytes) -> None:
        """A message could not be sent since its receiver's connection has ended."""
        with self._lock:
            name = self._names.pop(identity, None)
            peer = self._peers.get(name) if name is not None else None
            if peer is None or name is None or peer.identity != identity:
                return
            del self._peers[name]
            lost = list(peer.pending.values())
            self._lock.notify_all()
        _log.info("%s has gone", name)
        for future in lost:
            if not future.done():
                future.set_exception(ClosedError(f"{name} has gone: its connection has ended"))

    def _on_message(self, frames: list[bytes]) -> None:
        if len(frames) != 2:
            raise ProtocolError(f"a control message has {len(frames)} frames, expected 2")
        identity, content = frames
        frame = wire.decode(content)
        if isinstance(frame, wire.Hello):
            self._on_hello(identity, frame)
        elif isinstance(frame, wire.Reply | wire.Failure):
            self._on_answer(identity, frame)
        else:
            raise ProtocolError(f"unexpected {type(frame).__name__} from a participant")

    def _on_hello(self, identity: bytes, hello: wire.Hello) -> None:
        self._loop.send([identity, wire.encode(wire.Welcome())])
        if hello.version != wire.VERSION:
            _log.error(
                "%s speaks control version %d, expected %d", hello.name, hello.version, wire.VERSION
            )
            return
        with self._lock:
            known = self._peers.get(hello.name)
            if known is not None and known.identity == identity:
                return
            lost = list(known.pending.values()) if known is not None else []
            self._peers[hello.name] = _Peer(identity)
            self._names[identity] = hello.name
            self._lock.notify_all()
        for future in lost:
            if not future.done():
                future.set_exception(ClosedError(f"{hello.name} was restarted"))

    def _on_answer(self, identity: bytes, frame: wire.Reply | wire.Failure) -> None:
        with self._lock:
            name = self._names.get(identity)
            peer = self._peers.get(name) if name is not None else None
            if peer is None or name is None or peer.identity != identity:
                _log.debug("an answer came from somebody who is not a participant any more")
                return
            future = peer.pending.pop(frame.number, None)
        if future is None or future.done():
            return
        if isinstance(frame, wire.Failure):
            future.set_exception(wire.error_of(frame, name))
        else:
            future.set_result(frame.body)

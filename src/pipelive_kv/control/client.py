"""A participant's end of the control plane: the scheduler's or a stage's."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import zmq

from pipelive_kv.control import wire
from pipelive_kv.control.endpoint import ControlEndpoint
from pipelive_kv.control.loop import SocketLoop
from pipelive_kv.errors import InvalidArgumentError
from pipelive_kv.messages import Answer, Request

_log = logging.getLogger(__name__)

_WORKERS = 6
"""Requests that wait (for a resize, for convergence) must not keep an abort from being heard."""


class ControlClient:
    """Connects to the coordinator, whether it is there yet or not, and answers its requests.

    ``handle`` is called with each request in a worker thread, never in the engine's; what it
    returns is the answer, what it raises is raised again at the coordinator. ``on_lost`` is called,
    in the socket's thread, where the connection to the coordinator ends; what was asked over it and
    has not begun is not carried out any more.
    """

    def __init__(
        self,
        endpoint: ControlEndpoint,
        name: str,
        handle: Callable[[Request], Answer],
        on_lost: Callable[[], None] | None = None,
    ) -> None:
        if endpoint.address.endswith(":*"):
            raise InvalidArgumentError(
                f"control address is {endpoint.address!r}, expected the port the coordinator chose"
            )
        self._name = name
        self._handle = handle
        self._on_lost = on_lost
        self._connection = 0
        self._connected = False
        self._endpoint = endpoint
        self._identity = f"{name}#{secrets.token_hex(8)}".encode()
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._workers = ThreadPoolExecutor(_WORKERS, thread_name_prefix=f"pipelive-{name}")
        self._loop = SocketLoop(
            f"pipelive-control-{name}",
            self._connect,
            self._on_message,
            self._announce,
            events=zmq.EVENT_DISCONNECTED,
            on_event=self._on_disconnected,
        )

    @property
    def connected(self) -> bool:
        """Whether a coordinator has heard this participant and its connection still stands."""
        return self._connected

    def _connect(self) -> zmq.Socket[bytes]:
        dealer = self._context.socket(zmq.DEALER)
        dealer.identity = self._identity
        dealer.curve_serverkey = self._endpoint.key.server_public
        dealer.curve_publickey = self._endpoint.key.client_public
        dealer.curve_secretkey = self._endpoint.key.client_secret
        wire.limit(dealer)
        dealer.reconnect_ivl = 50
        dealer.reconnect_ivl_max = 1000
        # Without a coordinator announcements are dropped instead of queued without end.
        dealer.immediate = True
        dealer.connect(self._endpoint.address)
        return dealer

    def close(self) -> None:
        """Close the socket and end the worker threads; requests under way are not waited for."""
        self._loop.close()
        self._workers.shutdown(wait=False, cancel_futures=True)
        self._context.destroy(linger=200)

    def _announce(self) -> None:
        # Called from the loop's thread, before its first poll too.
        if hasattr(self, "_loop"):
            self._loop.send([wire.encode(wire.Hello(self._name))])

    def _on_disconnected(self, _event: int) -> None:
        self._connection += 1
        if self._connected:
            self._connected = False
            if self._on_lost is not None:
                self._on_lost()

    def _on_message(self, frames: list[bytes]) -> None:
        frame = wire.decode(frames[-1])
        if isinstance(frame, wire.Welcome):
            if frame.version != wire.VERSION:
                _log.error(
                    "the coordinator speaks control version %d, expected %d",
                    frame.version,
                    wire.VERSION,
                )
            self._connected = True
        elif isinstance(frame, wire.Call):
            self._workers.submit(self._answer, frame, self._connection)
        else:
            _log.error("unexpected %s from the coordinator", type(frame).__name__)

    def _answer(self, call: wire.Call, connection: int) -> None:
        if connection != self._connection:
            return  # who asked has gone, and another one may have taken its place
        reply: wire.Reply | wire.Failure
        try:
            reply = wire.Reply(call.number, self._handle(call.body))
        except Exception as error:
            _log.debug("%s: %s failed", self._name, type(call.body).__name__, exc_info=True)
            reply = wire.failure_of(call.number, error)
        self._loop.send([wire.encode(reply)])

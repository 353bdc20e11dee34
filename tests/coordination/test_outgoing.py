"""The connection from a source to one target."""

from __future__ import annotations

import struct
from typing import Any, cast

from pipelive_kv.migration import PatchSender
from pipelive_kv.stage.outgoing import Outgoing
from pipelive_kv.transport import Channel


class FakeChannel:
    def receive(self, timeout: float) -> bytes:
        return struct.pack("<Q", 7)

    def close(self) -> None:
        pass


class FakeSender:
    def __init__(self, channel: Any) -> None:
        self.channel = channel

    def cancel(self) -> None:
        pass


def test_a_lost_connection_is_made_again_by_the_way_for_that() -> None:
    ways: list[str] = []

    def way(name: str) -> Any:
        def connect(timeout: float) -> Channel:
            ways.append(name)
            return cast(Channel, FakeChannel())

        return connect

    move = Outgoing(
        1,
        (0,),
        way("first"),
        lambda channel: cast(PatchSender, FakeSender(channel)),
        connect_again=way("again"),
    )
    move.open(1.0)
    _, applied = move.reconnect(lambda: None)
    assert ways == ["first", "again"]
    assert applied == 7

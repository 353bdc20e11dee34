"""Two connected ends in one process, as the tests of paths have them."""

from __future__ import annotations

import time

from pipelive_kv.errors import ProtocolError
from pipelive_kv.transport import PatchListener, connect

KEY = b"0123456789abcdef0123456789abcdef"
SECONDS = 20


def pair(pool, kind, *, device=None, timeout=SECONDS, **options):
    listener_device = options.pop("listener_device", device)
    again = options.pop("again", False)
    with PatchListener(kind, key=KEY, device=listener_device, **options) as listener:
        accepted = pool.submit(listener.accept, timeout)
        try:
            connected = connect(
                listener.address, key=KEY, timeout=timeout, device=device, again=again
            )
        except ProtocolError as error:
            return accepted, error
        return accepted.result(), connected


def exchange(accepted, connected):
    for sender, receiver in ((accepted, connected), (connected, accepted)):
        sender.send(b"hello" * 1000, SECONDS)
        assert receiver.receive(SECONDS) == b"hello" * 1000


def soon(seconds=SECONDS):
    return time.monotonic() + seconds

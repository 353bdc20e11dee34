"""How long a stage waits for what, in seconds."""

from __future__ import annotations

GATE_TIMEOUT = 30.0
"""A gained layer's wait for its KV; the step fails after it."""

TRANSFER_TIMEOUT = 60.0
"""One message's or one acknowledgement's wait, also where a migration has no deadline any more."""

SESSION_TIMEOUT = 86400.0
"""A target's wait for its source to go on. The source's own deadline ends it earlier; once the
switchover is decided there is none, since an idle engine may take its time to run the step."""

STALL_TIMEOUT = 5.0
"""In write-through: one message's wait for a channel, or the tail's for its acknowledgement; then
the connection is made again."""

RECONNECT_TIMEOUT = 25.0
"""For a connection that was lost after the vote to be made again; below the gate's timeout."""

RECONNECT_ATTEMPT = 4.0
"""Of that, for one attempt; short of what a cancel waits for the thread that makes it."""

MOST_RECONNECTS = 16
"""Connections that one session makes anew before it takes the peer for broken."""

JOIN_TIMEOUT = 10.0
"""The wait for a thread that was cancelled."""

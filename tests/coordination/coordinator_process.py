"""A coordinator in a process of its own that stops at one point, where it is killed.

A point is a request's name and how many of them it has sent before ("Prepare", 1: stage 0 alone has
got it), or "decide" and whether the decision is written already (0 or 1). "cancel" as a further
argument lets it give up in that phase, so that the points of an abort are reached.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections import Counter

import pipelive_kv as pk
from pipelive_kv.control import ControlServer
from pipelive_kv.protocol import event_of

REACHED = "reached"


class CoordinatorProcess:
    """Starts one, waits for its point, and ends it."""

    def __init__(self, address, key_file, record_dir, counts, point, cancel_in="") -> None:
        arguments = [address, str(key_file), str(record_dir), ",".join(map(str, counts))]
        self.process = subprocess.Popen(
            [sys.executable, __file__, *arguments, point[0], str(point[1]), cancel_in],
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )
        self.said = []
        self.over = threading.Event()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        for line in self.process.stdout:
            self.said.append(line.strip())
            if self.said[-1] == REACHED:
                break
        self.over.set()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(timeout=60)
        self._reader.join(timeout=60)
        self.process.stdout.close()


def _stop_here() -> None:
    print(REACHED, flush=True)
    threading.Event().wait()


def _arrange(point: str, count: int) -> None:
    sent: Counter[str] = Counter()
    send, decide = ControlServer.start, pk.FileDecisionRecord.decide

    def start(server, name, body):
        event = event_of(body)
        if event == point and sent[event] == count:
            _stop_here()
        sent[event] += 1
        return send(server, name, body)

    def decided(record, decision):
        if point != "decide":
            return decide(record, decision)
        if count:
            decide(record, decision)
        return _stop_here()

    ControlServer.start = start
    pk.FileDecisionRecord.decide = decided


def main() -> None:
    address, key_file, record_dir, counts, point, count, cancel_in = sys.argv[1:]
    target = pk.Placement.from_counts([int(part) for part in counts.split(",")])
    _arrange(point, int(count))
    coordinator = pk.Coordinator(
        pk.ControlEndpoint(address, pk.ControlKey.load(key_file)),
        pp_size=target.num_stages,
        record_dir=record_dir,
    )
    coordinator.await_ready(60)
    started = threading.Event()

    def on_phase(phase) -> None:
        print(phase.value, flush=True)
        if phase.value == cancel_in:
            started.wait()
            job.cancel()

    job = coordinator.reconfigure(
        target, timeout=120, options=pk.MigrationOptions(max_stop_ms=100), on_phase=on_phase
    )
    started.set()
    job.wait()


if __name__ == "__main__":
    main()

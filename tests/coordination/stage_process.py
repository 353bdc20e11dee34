"""A stage in a process of its own, which takes part in reconfigurations and in no step."""

from __future__ import annotations

import os
import subprocess
import sys

from simulation import StageWorker

import pipelive_kv as pk


class StageProcess:
    """Starts one; kill it, or close it."""

    def __init__(self, rank, counts, endpoint, key_file) -> None:
        arguments = [str(rank), ",".join(map(str, counts)), endpoint.address, str(key_file)]
        self.process = subprocess.Popen(
            [sys.executable, __file__, *arguments],
            stdin=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(timeout=60)

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait(timeout=60)


def main() -> None:
    rank, counts, address, key_file = sys.argv[1:]
    placement = pk.Placement.from_counts([int(part) for part in counts.split(",")])
    worker = StageWorker(
        int(rank),
        placement.num_stages,
        placement,
        pk.ControlEndpoint(address, pk.ControlKey.load(key_file)),
        capacity=40,
        max_blocks=40,
        budget="64MiB",
        transport="auto",
    )
    sys.stdin.read()
    worker.stage.close()


if __name__ == "__main__":
    main()

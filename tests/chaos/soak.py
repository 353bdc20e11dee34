"""Back and forth under load, a thousand times; what the stages hold has to stay flat.

``python -m tests.chaos.soak --moves 1000 --json build/soak.json``
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

from pipelive_kv.coordinator import MigrationOptions
from pipelive_kv.models.tiny import tiny_model
from pipelive_kv.placement import Placement

from .service import Service, expected_tokens

FIRST, OTHER = (3, 3), (5, 1)
WARM = 20
"""Moves before the first look: pools of threads and caches have filled by then."""


def shared_bytes() -> int:
    """Bytes in memory files and shared memory, of the whole machine."""
    for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
        if line.startswith("Shmem:"):
            return int(line.split()[1]) * 1024
    return 0


def sample(service: Service) -> dict[str, list[int] | int]:
    """What is held, by stage, and by the driver."""
    held = service.await_rest()
    return {
        "descriptors": [sum(stage.fds.values()) for stage in held],
        "threads": [len(stage.threads) for stage in held],
        "mappings": [stage.mappings for stage in held],
        "used_bytes": [stage.used_bytes for stage in held],
        "rss_bytes": [stage.rss_bytes for stage in held],
        "driver_descriptors": len(os.listdir("/proc/self/fd")),
        "shared_bytes": shared_bytes(),
    }


def main() -> int:
    """Run it; 1 where a token was wrong or something has grown."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--moves", type=int, default=1000)
    parser.add_argument("--transport", default="shm")
    parser.add_argument("--json", type=Path, default=None)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="pk-soak-") as folder:
        model = tiny_model("qwen3", Path(folder))
        service = Service(
            model, FIRST, expected_tokens(model, FIRST), transport=arguments.transport
        )
        samples = []
        start = time.monotonic()
        try:
            for move in range(arguments.moves):
                counts = OTHER if move % 2 == 0 else FIRST
                service.engine.reconfigure(
                    Placement.from_counts(counts),
                    timeout=120,
                    options=MigrationOptions(max_stop_ms=1000.0),
                ).wait(180)
                if move + 1 == WARM or (move + 1) % 100 == 0:
                    samples.append({"moves": move + 1, **sample(service)})
                    print(json.dumps(samples[-1]), flush=True)
            wrong, finished = list(service.wrong), service.finished
        finally:
            service.close()
    seconds = time.monotonic() - start
    problems = wrong + grown(samples[0], samples[-1])
    print(
        f"{arguments.moves} moves and {finished} requests in {seconds:.0f} s; "
        + ("; ".join(problems) if problems else "all flat, every token as expected")
    )
    if arguments.json is not None:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(
            json.dumps({"samples": samples, "seconds": seconds, "problems": problems})
        )
    return 1 if problems else 0


def grown(first: dict, last: dict) -> list[str]:
    """What the last sample has more of than the first, beyond what comes and goes."""
    found = []
    for name, spare in (("descriptors", 4), ("threads", 2), ("mappings", 40), ("used_bytes", 0)):
        for rank, (before, after) in enumerate(zip(first[name], last[name], strict=True)):
            if after > before + spare:
                found.append(f"stage {rank}: {name} grew from {before} to {after}")
    for rank, (before, after) in enumerate(zip(first["rss_bytes"], last["rss_bytes"], strict=True)):
        if after > 1.1 * before + (16 << 20):
            found.append(f"stage {rank}: rss_bytes grew from {before} to {after}")
    return found


if __name__ == "__main__":
    sys.exit(main())

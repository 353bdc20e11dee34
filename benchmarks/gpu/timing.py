"""Times of work on a GPU, as the benchmarks of this folder take them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

AHEAD = 400_000
"""Cycles that the GPU spins before timed work, 0.2 ms: longer than it takes to queue that work."""


def gpu_seconds(work: Callable[[], Any]) -> float:
    """Seconds between two events around ``work``, which only queues.

    The stream is kept busy until everything is queued. Else the first event would be recorded on an
    idle GPU, and what the host takes to launch ``work`` would be in the time.
    """
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(AHEAD)
    begin.record()
    work()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) * 1e-3


def random_bytes(nbytes: int, device: str = "cuda") -> torch.Tensor:
    """Bytes to be copied. The same byte everywhere takes less power, and so is copied faster."""
    return torch.empty(nbytes, dtype=torch.uint8, device=device).random_()


def l2_bytes() -> int:
    """The size of the GPU's L2 cache; 0 where torch does not tell."""
    return int(getattr(torch.cuda.get_device_properties(0), "L2_cache_size", 0))


def in_l2(nbytes: int) -> str:
    """Whether work repeated over so many bytes finds them in the L2 cache: no, partly or yes."""
    cache = l2_bytes()
    return "yes" if nbytes <= cache else "partly" if nbytes <= 4 * cache else "no"

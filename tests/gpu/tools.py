"""What the tests on a GPU share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from pipelive_kv.kv import KVPool
from pipelive_kv.memory import PagePool
from pipelive_kv.spec import KVSpec

MIB = 1 << 20
PAGE = 2 * MIB
# Blocks of 128 KiB: 16 to a page.
SPEC = KVSpec(num_kv_heads=8, head_dim=128, dtype="bfloat16", block_size=32)


def make_pool(**arguments: object) -> KVPool:
    """Two of four layers, 64 of at most 1024 blocks: 4 pages in each layer."""
    defaults: dict[str, object] = {
        "num_layers": 4,
        "layers": [0, 1],
        "max_blocks": 1024,
        "capacity": 64,
    }
    if "page_pool" not in arguments:
        defaults["device"] = "cuda:0"
    return KVPool(SPEC, **{**defaults, **arguments})  # type: ignore[arg-type]


def free_bytes() -> int:
    """As the driver counts, for the whole device."""
    torch.cuda.synchronize()
    return torch.cuda.mem_get_info(0)[0]


def as_torch(lender: Any) -> torch.Tensor:
    return torch.from_dlpack(lender)


def spin(milliseconds: float) -> None:
    """A kernel on the current stream that takes about that long."""
    cycles_per_millisecond = 1_500_000
    torch.cuda._sleep(int(milliseconds * cycles_per_millisecond))


def pages_of(budget: int) -> PagePool:
    return PagePool(budget, device="cuda:0")


def captured(work: Callable[[], None]) -> torch.cuda.CUDAGraph:
    """``work`` as a graph, warmed up on a side stream first as torch wants it."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph

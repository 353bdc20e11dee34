"""A KV pool grows and shrinks by a gigabyte while a decode loop runs over its blocks.

Needs torch, and ``PYTHONPATH=src:benchmarks``; with ``--device cpu`` it runs anywhere.

A step is attention over all layers, and the host waits for it before it begins the next, as a
scheduler does. The capacity is lowered between two steps, with moves; a second thread takes the
pages away and maps them again meanwhile. A *stall* is what a step takes longer then than the steps
where nothing is resized.
"""

from __future__ import annotations

import math
import statistics
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch

from common import MIB, SPREAD_HEAD, Figure, Result, Spread, Table, finish, number, parser
from pipelive_kv.attention import paged_attention
from pipelive_kv.kv import KVPool
from pipelive_kv.spec import KVSpec

SPEC = KVSpec(8, 128, "bfloat16", 16)
GROUP = 4
LOW = 512
"""Blocks that always stay; the sequences lie in the lower half of them."""


class Decode:
    """The steps of an engine that decodes ``batch`` sequences, and when each of them ended."""

    def __init__(self, pool: KVPool, layers: int, batch: int, device: str) -> None:
        self._views = [pool.layer(layer) for layer in range(layers)]
        each = (LOW // 2 - 1) // batch
        tables = np.arange(1, 1 + batch * each, dtype=np.int32).reshape(batch, each)
        self._tables = torch.from_numpy(tables).to(device)
        self._lens = torch.full((batch,), each * SPEC.block_size, dtype=torch.int32, device=device)
        heads = GROUP * SPEC.num_kv_heads
        self._query = torch.randn((batch, heads, SPEC.head_dim), device=device).bfloat16()
        self._out = torch.empty_like(self._query)
        self.stream: Any = torch.cuda.Stream() if device == "cuda" else None
        if self.stream is not None:
            torch.cuda.synchronize()
            pool.use_stream(self.stream)

    def step(self, before: Callable[[], None] | None = None) -> float:
        """Run one step, and what comes before it; the seconds of both."""
        begin = time.perf_counter()
        if before is not None:
            before()
        scale = 1 / math.sqrt(SPEC.head_dim)
        with torch.cuda.stream(self.stream) if self.stream is not None else nullcontext():
            for view in self._views:
                paged_attention(
                    self._query, view, self._tables, self._lens, scale=scale, out=self._out
                )
        if self.stream is not None:
            self.stream.synchronize()
        return time.perf_counter() - begin

    def beside(self, work: Callable[[], None]) -> tuple[float, list[float]]:
        """Seconds of ``work`` in a thread of its own, and those of the steps meanwhile."""
        taken: list[float] = []

        def timed() -> None:
            begin = time.perf_counter()
            work()
            taken.append(time.perf_counter() - begin)

        thread = threading.Thread(target=timed)
        thread.start()
        steps = [self.step()]
        while thread.is_alive():
            steps.append(self.step())
        thread.join()
        return taken[0], steps


def measure(
    pool: KVPool, decode: Decode, high: int, rounds: int
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Seconds of the steps by what happens beside them, and of the operations by their names."""
    moves = {high - 1 - i: LOW // 2 + i for i in range(64)}
    steps: dict[str, list[float]] = {"nothing": [], "lower": [], "reclaim": [], "grow": []}
    taken: dict[str, list[float]] = {"lower": [], "reclaim": [], "grow": [], "shrink": []}

    def lower() -> None:
        begin = time.perf_counter()
        pool.shrink(LOW, live=moves, moves=moves, stream=decode.stream, reclaim=False)
        taken["lower"].append(time.perf_counter() - begin)

    for _ in range(20):
        decode.step()
    for _ in range(rounds):
        steps["nothing"] += [decode.step() for _ in range(100)]
        steps["lower"].append(decode.step(lower))
        for name, work in (("reclaim", pool.reclaim), ("grow", lambda: pool.grow(high))):
            seconds, found = decode.beside(work)
            taken[name].append(seconds)
            steps[name] += found
        # What a step would wait for if it took the pages away itself.
        begin = time.perf_counter()
        pool.shrink(LOW)
        taken["shrink"].append(time.perf_counter() - begin)
        pool.grow(high)
    return steps, taken


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    made.add_argument("--mib", type=int, default=1024, help="what the pool grows and shrinks by")
    made.add_argument("--layers", type=int, default=8)
    made.add_argument("--batch", type=int, default=8)
    made.add_argument("--rounds", type=int, default=20)
    made.add_argument("--quick", action="store_true", help="five rounds")
    arguments = made.parse_args()
    started = time.monotonic()
    rounds = 5 if arguments.quick else arguments.rounds
    high = LOW + arguments.mib * MIB // (arguments.layers * SPEC.block_bytes)
    if high < LOW + 128:
        made.error(f"--mib is {arguments.mib}, too little for 128 blocks of every layer")
    torch.manual_seed(arguments.seed)
    budget = 2 * (LOW + arguments.mib * MIB // SPEC.block_bytes) * SPEC.block_bytes
    budget += LOW * arguments.layers * SPEC.block_bytes
    with KVPool(
        SPEC,
        num_layers=arguments.layers,
        layers=range(arguments.layers),
        max_blocks=high,
        capacity=high,
        budget=budget,
        device=arguments.device,
    ) as pool:
        decode = Decode(pool, arguments.layers, arguments.batch, arguments.device)
        steps, taken = measure(pool, decode, high, rounds)
        if decode.stream is not None:
            pool.release_stream(decode.stream)
        pages = arguments.mib * MIB // pool.page_pool.page_bytes
    result = Result("resize_bench", data={"steps_s": steps, "operations_s": taken, "pages": pages})
    calm = Spread.of(steps["nothing"])
    for name in ("reclaim", "grow"):
        worst = Spread.of(steps[name])
        result.figures.append(
            Figure(
                f"longest step while the pool {name}s {arguments.mib} MiB",
                worst.max / calm.max,
                "of the longest where nothing is resized",
                "no stall: at most 1.5",
                f"steps of {number(1e3 * calm.p50)} ms",
                worst.max <= 1.5 * calm.max,
                f"{worst.count} steps",
            )
        )
    rows = [[name, *Spread.of(found).cells(1e3)] for name, found in steps.items()]
    result.tables.append(Table("Milliseconds of a step", ("beside it", *SPREAD_HEAD), rows))
    rows = [
        [name, number(1e3 * statistics.median(found)), number(1e3 * max(found)), per_page]
        for name, found in taken.items()
        for per_page in ["-" if name == "lower" else number(1e6 * statistics.median(found) / pages)]
    ]
    note = (
        f"{pages} pages of the pool's; `lower` moves 64 blocks and is all that a step waits for, "
        "`shrink` is lowering and reclaiming in one call."
    )
    head = ("operation", "median ms", "longest ms", "us a page")
    result.tables.append(Table("Milliseconds of an operation", head, rows, note))
    finish(result, arguments, started)


if __name__ == "__main__":
    main()

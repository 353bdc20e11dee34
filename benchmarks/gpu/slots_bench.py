"""Slots on a GPU: append with marks, collect, gather and scatter, each beside its limit.

Needs torch with CUDA, and ``PYTHONPATH=src:benchmarks``. Every limit is measured in the same run.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from common import Figure, Result, Table, finish, keep, number, parser
from pipelive_kv import _core
from pipelive_kv.attention import append
from pipelive_kv.kv import KVPool
from pipelive_kv.spec import KVSpec
from pipelive_kv.tracker import DirtyTracker
from timing import gpu_seconds, in_l2, random_bytes

SPEC = KVSpec(8, 128, "bfloat16", 16)
Ranges = npt.NDArray[np.uint64]


def replayed(work: Callable[[], None], repeats: int = 30, batch: int = 50) -> list[float]:
    """Seconds of one ``work`` in batches of a captured graph, so that no launch is waited for."""
    work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(batch):
            work()
    return [gpu_seconds(graph.replay) / batch for _ in range(repeats + 3)][3:]


def waited(work: Callable[[], None], repeats: int) -> list[float]:
    """Seconds of one ``work`` that waits for the GPU itself, as the host sees it."""
    for _ in range(3):
        work()
    times = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        work()
        times.append(time.perf_counter() - begin)
    return times


def median(times: list[float]) -> float:
    return statistics.median(times)


def append_times(
    pool: KVPool, tracker: DirtyTracker, tokens: int, seed: int, turns: int
) -> tuple[list[float], list[float], list[float]]:
    """Seconds of an append without marks, with them, and of copying as many bytes."""
    random = np.random.default_rng(seed)
    slots = random.permutation(pool.capacity * SPEC.block_size)[:tokens].astype(np.int64)
    on_gpu = torch.from_numpy(slots).cuda()
    key = torch.randn(tokens, SPEC.num_kv_heads, SPEC.head_dim, device="cuda").bfloat16()
    value = torch.randn_like(key)
    targets = torch.empty_like(key), torch.empty_like(key)
    layer = pool.layer(0)

    def plain() -> None:
        append(layer, key, value, on_gpu, stream=torch.cuda.current_stream())

    def marking() -> None:
        append(layer, key, value, on_gpu, stream=torch.cuda.current_stream(), marks=tracker)

    def copy() -> None:
        targets[0].copy_(key)
        targets[1].copy_(value)

    without, marked, limit = [], [], []
    for _ in range(turns):  # these take turns, since clocks drift
        without += replayed(plain, 8)
        marked += replayed(marking, 8)
        limit += replayed(copy, 8)
    return without, marked, limit


def bench_append(pool: KVPool, result: Result, seed: int, quick: bool) -> None:
    """With marks against without; and what a plain copy of as many bytes takes."""
    tracker = DirtyTracker(pool.max_blocks * SPEC.block_size, device=pool.page_pool.device)
    tracker.open(0)
    tracker.mark(0, torch.cuda.current_stream())
    rows = []
    for tokens in (64, 2048) if quick else (64, 256, 2048, 16384):
        times = append_times(pool, tracker, tokens, seed, 2 if quick else 5)
        without, marked, limit = (median(t) for t in times)
        excess = 100 * (marked / without - 1)
        rows.append(
            [
                str(tokens),
                *(number(1e6 * t) for t in (without, marked, limit)),
                f"{excess:.2f} %",
                in_l2(2 * tokens * SPEC.slot_bytes),  # keys and values, read and written
            ]
        )
        if tokens == 64:
            result.figures.append(
                Figure(
                    "append with marking, 64 tokens, against without",
                    excess,
                    "% slower",
                    "2 % at most",
                    f"without: {number(1e6 * without)} us",
                    excess <= 2,
                )
            )
    head = ("tokens", "append us", "with marks us", "two copies us", "excess", "stays in L2")
    result.tables.append(Table("Append of one layer, 8 heads of 128, bfloat16", head, rows))
    tracker.seal(0)


def bench_collect(pool: KVPool, result: Result, seed: int, quick: bool) -> None:
    """Of a million slots, as the patch thread sees it; and one empty launch with its wait."""
    slots = 1 << 20
    tracker = DirtyTracker(slots, device=pool.page_pool.device)
    kv = torch.empty(slots // 16, 1, 2, 16, 8, dtype=torch.bfloat16, device="cuda")
    one = torch.zeros(1, device="cuda")
    torch.cuda.synchronize()

    def trip() -> None:
        one.add_(1)
        torch.cuda.current_stream().synchronize()

    limit = median(waited(trip, 200))
    random = np.random.default_rng(seed)
    rows = []
    seq = 0
    patterns = (
        ("none", np.zeros(0, dtype=np.int64)),
        ("256 at random", random.permutation(slots)[:256]),
        ("16,384 at random", random.permutation(slots)[:16384]),
        ("4,096 runs of 64", (np.arange(4096)[:, None] * 256 + np.arange(64)).reshape(-1)),
        ("all", np.arange(slots)),
        ("every second", np.arange(0, slots, 2)),
    )
    for name, marked in patterns[: 3 if quick else None]:
        on_gpu = torch.from_numpy(marked.astype(np.int64)).cuda()
        key = torch.zeros(max(1, len(marked)), 1, 8, dtype=torch.bfloat16, device="cuda")
        times, found = [], 0
        for turn in range(33):
            tracker.open(seq)
            tracker.mark(seq, torch.cuda.current_stream())
            if len(marked):
                append(kv, key, key, on_gpu, marks=tracker)
            torch.cuda.synchronize()
            tracker.seal(seq)
            seq += 1
            begin = time.perf_counter()
            collected = tracker.collect()
            if turn >= 3:
                times.append(time.perf_counter() - begin)
            found = len(collected.ranges)
            if collected.num_slots != len(marked):
                raise SystemExit(f"{collected.num_slots} slots collected, {len(marked)} marked")
        rows.append([name, str(found), number(1e6 * median(times)), number(1e6 * min(times))])
        if name.startswith("256"):
            result.figures.append(
                Figure(
                    "collect of 2^20 slots, 256 marked",
                    1e6 * median(times),
                    "us",
                    "20 us at most",
                    f"an empty launch and its wait: {number(1e6 * limit)} us",
                    median(times) <= 20e-6,
                )
            )
    head = ("marked", "ranges", "median us", "least us")
    result.tables.append(
        Table("Collect of 2^20 slots, host to host", head, rows, "Many ranges are the host's work.")
    )


def pattern(length: int, total_slots: int, num_slots: int, seed: int) -> Ranges:
    """Ranges of ``length`` slots that begin anywhere, ``total_slots`` in all."""
    places = num_slots // (2 * length)
    count = min(places, max(1, total_slots // length))
    begins = np.sort(np.random.default_rng(seed).permutation(places)[:count]) * (2 * length)
    shift = 0 if length % SPEC.block_size == 0 else 1
    return np.stack([begins + shift, np.full(count, length)], axis=1).astype(np.uint64)


def device_rates(copier: Any, ranges: Ranges, nbytes: int) -> tuple[float, list[float]]:
    """Bytes a second of a device copy; of gather, of scatter, and of gather with checksum."""
    packed = random_bytes(nbytes)
    other = torch.empty_like(packed)

    def plain() -> None:
        other.copy_(packed)
        torch.cuda.current_stream().synchronize()

    works: tuple[Callable[[], Any], ...] = (
        lambda: copier.gather(ranges, packed, False),
        lambda: copier.scatter(ranges, packed),
        lambda: copier.gather(ranges, packed, True),
    )
    limit = nbytes / median(waited(plain, 10))
    return limit, [nbytes / median(waited(work, 10)) for work in works]


def host_rates(copier: Any, ranges: Ranges, nbytes: int) -> tuple[float, list[float]]:
    """Bytes a second of a copy to pinned memory; of gather without and with checksum, scatter."""
    source = random_bytes(nbytes)
    pinned = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
    pageable = np.random.default_rng(1).integers(0, 256, nbytes, dtype=np.uint8)

    def fetch() -> None:
        pinned.copy_(source, non_blocking=True)
        torch.cuda.current_stream().synchronize()

    works: tuple[Callable[[], Any], ...] = (
        lambda: copier.gather(ranges, pageable, False),
        lambda: copier.gather(ranges, pageable, True),
        lambda: copier.scatter(ranges, pageable),
    )
    limit = nbytes / median(waited(fetch, 5))
    return limit, [nbytes / median(waited(work, 5)) for work in works]


def bench_copies(pool: KVPool, layers: int, result: Result, seed: int, quick: bool) -> None:
    """Gather, scatter and digest against copies of as many bytes."""
    copier = _core.SlotCopier(SPEC.core, {layer: pool.layer(layer) for layer in range(layers)})
    num_slots = pool.capacity * SPEC.block_size
    tables: tuple[list[list[str]], list[list[str]]] = ([], [])
    for length in (16, 256) if quick else (1, 16, 256, 4096, num_slots // 2):
        ranges = pattern(length, num_slots // 2, num_slots, seed)
        slot = layers * SPEC.slot_bytes
        # The host's memory takes less: what fits 256 MiB.
        few = ranges[: max(1, (256 << 20) // (slot * length))].copy()
        few[:, 1] = np.minimum(few[:, 1], (256 << 20) // slot)
        for chosen, measure, rows in (
            (ranges, device_rates, tables[0]),
            (few, host_rates, tables[1]),
        ):
            nbytes = int(chosen[:, 1].sum()) * slot
            limit, rates = measure(copier, chosen, nbytes)
            cells = [f"{number(rate / 1e9)} ({rate / limit:.2f})" for rate in rates]
            size = number(nbytes / 2**20)
            rows.append([str(length), str(len(chosen)), size, number(limit / 1e9), *cells])
            if measure is device_rates and length in (16, 256):
                name = f"gather of ranges of {length} slots on the device"
                limit_text = f"{number(limit / 1e9)} GB/s"
                ratio = rates[0] / limit
                result.figures.append(
                    Figure(name, ratio, "of a device copy", "near 1", limit_text, ratio >= 0.8)
                )
        torch.cuda.empty_cache()
    head = ("slots per range", "ranges", "MiB", "copy GB/s")
    result.tables.append(
        Table(
            f"Packed on the device, {layers} layers; GB/s (of a device copy)",
            (*head, "gather", "scatter", "gather and CRC32C"),
            tables[0],
        )
    )
    result.tables.append(
        Table(
            f"Packed in pageable memory of the host, {layers} layers; GB/s (of a pinned copy)",
            (*head, "gather", "gather and CRC32C", "scatter"),
            tables[1],
            "One thread of the host copies between pinned and pageable memory.",
        )
    )


def main() -> None:
    """Run all of it."""
    options = parser(__doc__)
    options.add_argument("--blocks", type=int, default=4096, help="of 16 tokens in each layer")
    options.add_argument("--layers", type=int, default=8)
    options.add_argument("--quick", action="store_true", help="only what has figures, fewer times")
    arguments = options.parse_args()
    seed, quick = arguments.seed, arguments.quick
    started = time.monotonic()
    result = Result("slots on a GPU")
    result.data["gpu"] = torch.cuda.get_device_name()
    result.data["torch"] = torch.__version__
    budget = 2 * arguments.layers * arguments.blocks * SPEC.block_bytes + (256 << 20)
    with KVPool(
        SPEC,
        num_layers=arguments.layers,
        layers=range(arguments.layers),
        max_blocks=arguments.blocks,
        capacity=arguments.blocks,
        budget=budget,
        device="cuda",
    ) as pool:
        for layer in range(arguments.layers):
            torch.from_dlpack(pool.layer(layer)).normal_()
        parts: list[tuple[str, Callable[[], Any]]] = [
            ("append", lambda: bench_append(pool, result, seed, quick)),
            ("collect", lambda: bench_collect(pool, result, seed, quick)),
            ("copies", lambda: bench_copies(pool, arguments.layers, result, seed, quick)),
        ]
        for name, part in parts:
            print(f"{name} ...", file=sys.stderr, flush=True)
            part()
            keep(result, arguments, started)
    finish(result, arguments, started)


if __name__ == "__main__":
    main()

"""Paged attention on a GPU beside a device copy, torch SDPA and FlashInfer.

Needs torch with CUDA, and ``PYTHONPATH=src:benchmarks``. FlashInfer is measured where it can be
imported (``--flashinfer off`` leaves it out: it compiles for minutes). Times are of CUDA graphs,
the ways take turns, and every result is compared with SDPA's before it is timed.
"""

from __future__ import annotations

import importlib
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from common import Figure, Result, Table, finish, keep, number, parser
from pipelive_kv.attention import paged_attention
from timing import gpu_seconds, in_l2, l2_bytes, random_bytes

Work = Callable[[], torch.Tensor]
BLOCK = 16
WORST = 3e-2  # of bfloat16 results, against SDPA's


@dataclass(frozen=True)
class Shape:
    """A batch of sequences of one length."""

    batch: int
    length: int
    q_heads: int = 32
    kv_heads: int = 8
    dim: int = 128
    queries: int = 1

    @property
    def kv_bytes(self) -> int:
        return self.batch * self.length * self.kv_heads * self.dim * 2 * 2

    @property
    def flops(self) -> float:
        seen = self.length - (self.queries - 1) / 2
        return 4.0 * self.batch * self.queries * self.q_heads * self.dim * seen

    def __str__(self) -> str:
        heads = f"{self.q_heads}/{self.kv_heads} heads of {self.dim}"
        queries = "" if self.queries == 1 else f", {self.queries} queries"
        return f"batch {self.batch}, {self.length} tokens, {heads}{queries}"


class Batch:
    """Random tensors of a shape, in blocks of a stack of layers, permuted."""

    def __init__(self, shape: Shape, stack: int, seed: int) -> None:
        self.shape = shape
        generator = torch.Generator(device="cuda").manual_seed(seed)
        per_seq = -(-shape.length // BLOCK)
        blocks = shape.batch * per_seq
        self.memory = torch.empty(
            (blocks, stack, shape.kv_heads, 2, BLOCK, shape.dim),
            dtype=torch.bfloat16,
            device="cuda",
        )
        for block in range(0, blocks, 4096):  # in pieces, since normal_ takes memory of its own
            self.memory[block : block + 4096].normal_(generator=generator)
        self.kv = self.memory[:, stack - 1]
        ids = torch.randperm(blocks, generator=generator, device="cuda", dtype=torch.int32)
        self.tables = ids.view(shape.batch, per_seq)
        self.lens = torch.full((shape.batch,), shape.length, dtype=torch.int32, device="cuda")
        rows = shape.batch * shape.queries
        self.query = torch.empty(
            (rows, shape.q_heads, shape.dim), dtype=torch.bfloat16, device="cuda"
        ).normal_(generator=generator)
        self.query_start = torch.arange(
            0, rows + 1, shape.queries, dtype=torch.int32, device="cuda"
        )
        self.scale = 1.0 / math.sqrt(shape.dim)

    def ours(self) -> Work:
        out = torch.empty_like(self.query)
        start = None if self.shape.queries == 1 else self.query_start

        def work() -> torch.Tensor:
            return paged_attention(
                self.query,
                self.kv,
                self.tables,
                self.lens,
                scale=self.scale,
                query_start=start,
                out=out,
            )

        return work

    def gathered(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values as [batch, head, token, dim], contiguous."""
        shape = self.shape
        found = []
        for side in (0, 1):
            blocks = self.kv[:, :, side][self.tables.long().flatten()]
            blocks = blocks.view(shape.batch, -1, shape.kv_heads, BLOCK, shape.dim)
            tokens = blocks.transpose(1, 2).reshape(shape.batch, shape.kv_heads, -1, shape.dim)
            found.append(tokens[:, :, : shape.length].contiguous())
        return found[0], found[1]

    def sdpa(self, *, gather: bool, plain_mask: bool = False) -> Work:
        """SDPA over contiguous tensors, or on blocks that are gathered in every call.

        A plain mask works with every one of its kernels, but keeps it from the fast ones.
        """
        shape = self.shape
        query = self.query.view(shape.batch, shape.queries, shape.q_heads, shape.dim)
        query = query.transpose(1, 2).contiguous()
        fixed = None if gather else self.gathered()
        mask = None
        if shape.queries > 1 and shape.queries != shape.length:
            if plain_mask:
                mask = torch.ones(shape.queries, shape.length, dtype=torch.bool, device="cuda")
                mask = mask.tril(shape.length - shape.queries)
            else:
                bias = importlib.import_module("torch.nn.attention.bias")
                mask = bias.causal_lower_right(shape.queries, shape.length)

        def work() -> torch.Tensor:
            key, value = fixed or self.gathered()
            out = torch.nn.functional.scaled_dot_product_attention(
                query,
                key,
                value,
                attn_mask=mask,
                is_causal=shape.queries == shape.length > 1,
                scale=self.scale,
                enable_gqa=True,
            )
            return out.transpose(1, 2).reshape(self.query.shape)

        return work

    def flashinfer(self, *, tensor_cores: bool) -> Work:
        """FlashInfer's paged decode, on the same strided blocks."""
        library = importlib.import_module("flashinfer")
        shape = self.shape
        per_seq = self.tables.shape[1]
        workspace = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
        wrapper = library.BatchDecodeWithPagedKVCacheWrapper(
            workspace, "HND", use_tensor_cores=tensor_cores
        )
        wrapper.plan(
            torch.arange(0, (shape.batch + 1) * per_seq, per_seq, dtype=torch.int32),
            self.tables.flatten(),
            torch.full((shape.batch,), (shape.length - 1) % BLOCK + 1, dtype=torch.int32),
            shape.q_heads,
            shape.kv_heads,
            shape.dim,
            BLOCK,
            q_data_type=torch.bfloat16,
            kv_data_type=torch.bfloat16,
            sm_scale=self.scale,
        )
        sides = (self.kv[:, :, 0], self.kv[:, :, 1])
        out = torch.empty_like(self.query)

        def work() -> torch.Tensor:
            wrapper.run(self.query, sides, out=out)
            return out

        return work


def seconds_of(works: dict[str, Work], rounds: int, calls: int) -> dict[str, float]:
    """Median seconds of one call of each, taking turns."""
    graphs = {}
    for name, work in works.items():
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            work()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(calls):
                work()
        graphs[name] = graph
    times: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(rounds + 2):
        for name, graph in graphs.items():
            taken = gpu_seconds(graph.replay) / calls
            if turn >= 2:
                times[name].append(taken)
    return {name: statistics.median(found) for name, found in times.items()}


def copy_rate(nbytes: int = 2 << 30) -> float:
    """Bytes per second, read and written, of a copy on the device.

    Not of a captured one: on some GPUs large copies take twice as long in a graph
    (pytorch/pytorch issue 191284), and what is measured here is the limit.
    """
    source = random_bytes(nbytes)
    target = torch.empty_like(source)
    times = [gpu_seconds(lambda: target.copy_(source)) for _ in range(14)]
    return 2 * nbytes / statistics.median(times[4:])


def worst_difference(work: Work, reference: torch.Tensor) -> float:
    difference = (work().float() - reference.float()).abs()
    return float((difference / reference.float().abs().clamp(min=1.0)).max())


def ways_of(batch: Batch, flashinfer: bool) -> Iterator[tuple[str, Callable[[], Work]]]:
    """The ways to compute a batch: a name, and what makes it."""
    yield "ours", batch.ours
    yield "SDPA, contiguous", lambda: batch.sdpa(gather=False)
    if batch.shape.queries == 1:
        yield "SDPA on gathered blocks", lambda: batch.sdpa(gather=True)
        if flashinfer:
            yield "FlashInfer", lambda: batch.flashinfer(tensor_cores=False)
            yield "FlashInfer, tensor cores", lambda: batch.flashinfer(tensor_cores=True)


def measure(batch: Batch, flashinfer: bool, rounds: int) -> tuple[dict[str, float], dict[str, str]]:
    """Seconds of every way that gives the right result, and what is wrong with the others."""
    works: dict[str, Work] = {}
    problems: dict[str, str] = {}
    reference = batch.sdpa(gather=False, plain_mask=True)().clone()
    for name, make in ways_of(batch, flashinfer):
        try:
            work = make()
            worst = worst_difference(work, reference)
            torch.cuda.synchronize()
        except (RuntimeError, ValueError, TypeError, ImportError) as error:
            problems[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"
            continue
        if worst < WORST:
            works[name] = work
        else:
            problems[name] = f"differs from SDPA by {worst:.3g}"
    calls = max(1, min(50, int(2e-2 / (batch.shape.kv_bytes / 2e12 + batch.shape.flops / 1e14))))
    return seconds_of(works, rounds, calls), problems


def bench_decode(
    result: Result, options: Any, flashinfer: bool, copy: float, kept: Callable[[], None]
) -> None:
    """Decode of many shapes; the first one has the figures. ``kept`` is called after each."""
    shapes = [
        Shape(64, 8192),
        Shape(1, 8192),
        Shape(1, 65536),
        Shape(16, 1024),
        Shape(256, 512),
        Shape(64, 8192, 8, 8),
        Shape(64, 8192, 64, 8),
        Shape(32, 8192, 128, 8),
        Shape(64, 8192, 32, 8, 64),
        Shape(32, 8192, 16, 8, 256),
    ]
    rows = []
    for index, shape in enumerate(shapes[: 1 if options.quick else None]):
        print(f"decode: {shape} ...", file=sys.stderr, flush=True)
        batch = Batch(shape, 1, options.seed)
        seconds, problems = measure(batch, flashinfer, options.rounds)
        result.data[f"decode {shape}"] = {**seconds, **problems}
        for name, taken in seconds.items():
            rate = shape.kv_bytes / taken
            share = f"{rate / copy:.3f}"
            rows.append([str(shape), name, number(1e6 * taken), share, in_l2(shape.kv_bytes)])
            print(f"{name}: {number(1e6 * taken)} us, {rate / copy:.3f} of the copy rate")
        rows += [[str(shape), name, "-", text, "-"] for name, text in problems.items()]
        if index == 0:
            add_figures(result, shape, seconds, problems, copy)
        kept()
        del batch
        torch.cuda.empty_cache()
    head = ("batch", "way", "us", "KV bytes of copy rate", "KV stays in L2")
    note = (
        "The copy counts bytes read and written; SDPA on gathered blocks moves KV three times. "
        "Calls follow each other on the same batch, so where its KV stays in the L2 cache of "
        f"{number(l2_bytes() / 2**20)} MiB it is not read from memory, and no copy is its limit."
    )
    result.tables.append(Table("Decode", head, rows, note))


def add_figures(
    result: Result,
    shape: Shape,
    seconds: dict[str, float],
    problems: dict[str, str],
    copy: float,
) -> None:
    if "ours" not in seconds:
        result.figures.append(
            Figure("decode", math.nan, "", "at least 0.85", problems["ours"], False)
        )
        return
    ours = seconds.pop("ours")
    share = shape.kv_bytes / ours / copy
    limit = f"{number(copy / 1e9)} GB/s read and written"
    result.figures.append(
        Figure(f"decode, {shape}", share, "of a device copy", "at least 0.85", limit, share >= 0.85)
    )
    if seconds:
        best = min(seconds, key=lambda name: seconds[name])
        ratio = seconds[best] / ours
        name = f"decode beside the best other ({best})"
        limit = f"{number(1e6 * seconds[best])} us"
        figure = Figure(name, ratio, "of its speed", "at least 0.9", limit, ratio >= 0.9)
        result.figures.append(figure)


def bench_stacks(result: Result, options: Any, flashinfer: bool) -> None:
    """Stock kernels on strided views, whose blocks lie apart, against contiguous ones."""
    shape = Shape(64, 8192)
    rows = []
    first: dict[str, float] = {}
    for stack in (1, 2, 4):
        print(f"stack {stack} ...", file=sys.stderr, flush=True)
        batch = Batch(shape, stack, options.seed)
        seconds, problems = measure(batch, flashinfer, options.rounds)
        seconds.pop("SDPA, contiguous", None)
        first = first or seconds
        for name, taken in seconds.items():
            ratio = first[name] / taken if name in first else math.nan
            rows.append([str(stack), name, number(1e6 * taken), f"{ratio:.3f}"])
        rows += [[str(stack), name, "-", text] for name, text in problems.items()]
        del batch
        torch.cuda.empty_cache()
    head = ("stack", "way", "us", "speed of stack 1")
    result.tables.append(Table(f"Views of stacked layers, {shape}", head, rows))


def bench_prefill(result: Result, options: Any) -> None:
    """Chunks of prompts."""
    rows = []
    for shape in (
        Shape(1, 2048, queries=2048),
        Shape(1, 8192, queries=2048),
        Shape(8, 1024, queries=1024),
        Shape(16, 4096, queries=64),
    ):
        print(f"prefill: {shape} ...", file=sys.stderr, flush=True)
        batch = Batch(shape, 1, options.seed)
        seconds, problems = measure(batch, False, options.rounds)
        for name, taken in seconds.items():
            rows.append([str(shape), name, number(1e6 * taken), number(shape.flops / taken / 1e12)])
        rows += [[str(shape), name, "-", text] for name, text in problems.items()]
        del batch
        torch.cuda.empty_cache()
    result.tables.append(Table("Prefill", ("batch", "way", "us", "TFLOP/s"), rows))


def main() -> None:
    """Run all of it."""
    made = parser(__doc__)
    made.add_argument("--rounds", type=int, default=15, help="measurements of each way")
    made.add_argument("--flashinfer", choices=("auto", "off"), default="auto")
    made.add_argument("--quick", action="store_true", help="only the shape that has figures")
    options = made.parse_args()
    started = time.monotonic()
    flashinfer = options.flashinfer == "auto"
    result = Result("attention on a GPU")
    result.data["gpu"] = torch.cuda.get_device_name()
    result.data["torch"] = torch.__version__
    if flashinfer:
        try:
            result.data["flashinfer"] = importlib.import_module("flashinfer").__version__
        except ImportError as error:
            flashinfer = False
            result.data["flashinfer"] = str(error)
    copy = copy_rate()
    result.data["copy_bytes_per_second"] = copy
    result.data["l2_bytes"] = l2_bytes()
    bench_decode(result, options, flashinfer, copy, lambda: keep(result, options, started))
    if not options.quick:
        keep(result, options, started)
        bench_stacks(result, options, flashinfer)
        keep(result, options, started)
        bench_prefill(result, options)
    finish(result, options, started)


if __name__ == "__main__":
    main()

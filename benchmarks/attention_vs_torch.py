"""Paged attention beside torch's scaled_dot_product_attention over gathered, contiguous KV.

Both get the same tokens, dtype and number of threads. torch is given the KV contiguous, as an
engine without paged kernels would have to gather it first; what the gather costs is a column of its
own. Runs of the two alternate, so that a busy neighbour meets both. Figures are medians with the
quartiles beside them.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from pipelive_kv.attention import available_isas, paged_attention

KV_HEADS = 4
HEAD_DIM = 128
BLOCK_SIZE = 16


@dataclass(frozen=True)
class Shape:
    dtype: str
    batch: int
    context: int
    query_len: int
    group: int


@dataclass(frozen=True)
class Timing:
    """Microseconds."""

    median: float
    lower: float
    upper: float

    def __str__(self) -> str:
        return f"{self.median:9.0f} ({self.lower:.0f}-{self.upper:.0f})"


SHAPES = [
    *(Shape("bfloat16", 8, 2048, 1, group) for group in (1, 4, 8)),
    *(Shape("float32", 8, 2048, 1, group) for group in (1, 4, 8)),
    Shape("float16", 8, 2048, 1, 4),
    Shape("bfloat16", 1, 16384, 1, 4),
    Shape("bfloat16", 32, 256, 1, 4),
    *(Shape(dtype, 1, 1024, 256, group) for dtype in ("bfloat16", "float32") for group in (1, 4)),
]


def summarise(seconds: list[float]) -> Timing:
    lower, median, upper = statistics.quantiles(seconds, n=4)
    return Timing(median * 1e6, lower * 1e6, upper * 1e6)


def alternate(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, Timing]:
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in range(rounds):
        for name, call in calls.items():
            begin = time.perf_counter()
            call()
            taken[name].append(time.perf_counter() - begin)
    return {name: summarise(seconds) for name, seconds in taken.items()}


def measure(shape: Shape, threads: int, rounds: int, isa: str | None) -> dict[str, Timing]:
    generator = torch.Generator().manual_seed(1)
    dtype = getattr(torch, shape.dtype)
    width = -(-shape.context // BLOCK_SIZE)
    heads = KV_HEADS * shape.group
    kv = torch.randn(
        (shape.batch * width, KV_HEADS, 2, BLOCK_SIZE, HEAD_DIM), generator=generator
    ).to(dtype)
    ids = torch.randperm(shape.batch * width, generator=generator)
    tables = ids.view(shape.batch, width).to(torch.int32)
    lens = torch.full((shape.batch,), shape.context, dtype=torch.int32)
    starts = torch.arange(shape.batch + 1, dtype=torch.int32) * shape.query_len
    query = torch.randn((shape.batch * shape.query_len, heads, HEAD_DIM), generator=generator).to(
        dtype
    )
    scale = 1.0 / math.sqrt(HEAD_DIM)

    def gather() -> tuple[torch.Tensor, torch.Tensor]:
        blocks = kv[ids].view(shape.batch, width, KV_HEADS, 2, BLOCK_SIZE, HEAD_DIM)
        pairs = blocks.permute(3, 0, 2, 1, 4, 5).reshape(
            2, shape.batch, KV_HEADS, width * BLOCK_SIZE, HEAD_DIM
        )
        return pairs[0, :, :, : shape.context], pairs[1, :, :, : shape.context]

    key, value = (part.contiguous() for part in gather())
    dense_query = query.view(shape.batch, shape.query_len, heads, HEAD_DIM).transpose(1, 2)
    dense_query = dense_query.contiguous()
    mask = None
    if shape.query_len > 1:
        mask = torch.ones(shape.query_len, shape.context, dtype=torch.bool).tril(
            shape.context - shape.query_len
        )

    def ours() -> torch.Tensor:
        return paged_attention(
            query, kv, tables, lens, scale=scale, query_start=starts, threads=threads, isa=isa
        )

    def torchs() -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(
            dense_query, key, value, attn_mask=mask, scale=scale, enable_gqa=shape.group > 1
        )

    close = 1e-4 if dtype == torch.float32 else 3e-2
    expected = torchs().transpose(1, 2).reshape(query.shape)
    torch.testing.assert_close(ours(), expected, rtol=close, atol=close)
    return alternate({"ours": ours, "torch": torchs, "gather": gather}, rounds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--isa", choices=available_isas(), help="default: as the library chooses")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--json", type=Path, help="where to write the figures as well")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(
        f"threads {options.threads}, isa {options.isa or 'as the library chooses'}, "
        f"torch {torch.__version__},"
    )
    print(f"{KV_HEADS} KV heads of {HEAD_DIM}, blocks of {BLOCK_SIZE}; microseconds (quartiles)")
    records = []
    for shape in SHAPES:
        timings = measure(shape, options.threads, options.rounds, options.isa)
        item = 4 if shape.dtype == "float32" else 2
        size = shape.batch * shape.context * KV_HEADS * HEAD_DIM * 2 * item
        print(
            f"{shape.dtype:8} batch {shape.batch:2} context {shape.context:5} "
            f"query {shape.query_len:3} G {shape.group}: ours {timings['ours']}, "
            f"{size / timings['ours'].median / 1e3:.1f} GB/s; torch {timings['torch']}; "
            f"gather {timings['gather']}; {timings['torch'].median / timings['ours'].median:.1f}x"
        )
        records.append(
            asdict(shape)
            | {"threads": options.threads}
            | {name: asdict(timing) for name, timing in timings.items()}
        )
    if options.json is not None:
        options.json.write_text(json.dumps(records, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

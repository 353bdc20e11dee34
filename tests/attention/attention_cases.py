"""Random paged-attention cases and what they should give, in float64 over the stored KV."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch

TOLERANCE = {torch.float32: 2e-5, torch.float16: 1e-3, torch.bfloat16: 1e-2}


@dataclass
class Case:
    """A cache with permuted blocks, NaN wherever no token lies, and a batch of queries over it."""

    q_heads: int
    kv_heads: int
    head_dim: int
    block_size: int
    seq_lens: list[int]
    query_lens: list[int]
    dtype: torch.dtype
    query_dtype: torch.dtype | None = None
    order: str = "hnd"
    window: int = 0
    soft_cap: float = 0.0
    seed: int = 0
    spare_blocks: int = 3
    magnitude: float = 1.0
    scale: float = field(init=False)

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(self.seed)
        self.scale = 1.0 / math.sqrt(self.head_dim)
        query_dtype = self.query_dtype or self.dtype
        counts = [-(-n // self.block_size) for n in self.seq_lens]
        num_blocks = sum(counts) + self.spare_blocks
        self.kv = empty_kv(
            (num_blocks, self.kv_heads, self.block_size, self.head_dim), self.dtype, self.order
        )
        self.kv.fill_(math.nan)
        ids = torch.randperm(num_blocks, generator=generator)
        width = max([*counts, 0]) + 1
        self.tables = torch.full((len(self.seq_lens), width), -7, dtype=torch.int32)
        self.keys: list[torch.Tensor] = []
        self.values: list[torch.Tensor] = []
        taken = 0
        for seq, (length, count) in enumerate(zip(self.seq_lens, counts, strict=True)):
            mine = ids[taken : taken + count]
            taken += count
            self.tables[seq, :count] = mine.to(torch.int32)
            shape = (length, self.kv_heads, self.head_dim)
            key = (torch.randn(shape, generator=generator) * self.magnitude).to(self.dtype)
            value = torch.randn(shape, generator=generator).to(self.dtype)
            # Only what some query token attends to is there; the rest stays NaN.
            first = 0
            if self.window:
                first = max(0, length - self.query_lens[seq] - self.window + 1)
            positions = torch.arange(first, length)
            blocks = mine[positions // self.block_size] if length else positions
            self.kv[blocks, :, 0, positions % self.block_size] = key[first:]
            self.kv[blocks, :, 1, positions % self.block_size] = value[first:]
            self.tables[seq, : first // self.block_size] = -7
            self.keys.append(key)
            self.values.append(value)
        self.lens = torch.tensor(self.seq_lens, dtype=torch.int32)
        starts = [0]
        for n in self.query_lens:
            starts.append(starts[-1] + n)
        self.query_start = torch.tensor(starts, dtype=torch.int32)
        self.query = torch.randn((starts[-1], self.q_heads, self.head_dim), generator=generator).to(
            query_dtype
        )

    @property
    def options(self) -> dict[str, object]:
        return {
            "scale": self.scale,
            "query_start": self.query_start,
            "window": self.window,
            "soft_cap": self.soft_cap,
        }

    def expected(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The result and the log-sum-exp in float64."""
        out = torch.zeros(self.query.shape, dtype=torch.float64)
        lse = torch.full(self.query.shape[:2], -math.inf, dtype=torch.float64)
        group = self.q_heads // self.kv_heads
        for seq, length in enumerate(self.seq_lens):
            rows = slice(int(self.query_start[seq]), int(self.query_start[seq + 1]))
            if length == 0 or rows.start == rows.stop:
                continue
            query = self.query[rows].double()
            key = self.keys[seq].double().repeat_interleave(group, dim=1)
            value = self.values[seq].double().repeat_interleave(group, dim=1)
            scores = torch.einsum("qhd,khd->hqk", query, key) * self.scale
            if self.soft_cap:
                scores = self.soft_cap * torch.tanh(scores / self.soft_cap)
            at = torch.arange(length - self.query_lens[seq], length)[:, None]
            position = torch.arange(length)[None, :]
            allowed = position <= at
            if self.window:
                allowed &= position > at - self.window
            scores = scores.masked_fill(~allowed, -math.inf)
            out[rows] = torch.einsum("hqk,khd->qhd", torch.softmax(scores, -1), value)
            lse[rows] = torch.logsumexp(scores, -1).T
        return out, lse


def empty_kv(shape: tuple[int, int, int, int], dtype: torch.dtype, order: str) -> torch.Tensor:
    """``[block, kv_head, 2, token, dim]`` over memory in the order hnd, nhd or split.

    ``shape`` is (blocks, kv_heads, block_size, head_dim).
    split keeps keys and values in two halves of the memory, as some engines do.
    """
    blocks, kv_heads, block_size, head_dim = shape
    if order == "hnd":
        return torch.empty((blocks, kv_heads, 2, block_size, head_dim), dtype=dtype)
    if order == "nhd":
        kv = torch.empty((blocks, 2, block_size, kv_heads, head_dim), dtype=dtype)
        return kv.permute(0, 3, 1, 2, 4)
    kv = torch.empty((2, blocks, block_size, kv_heads, head_dim), dtype=dtype)
    return kv.permute(1, 3, 0, 2, 4)


def error_of(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest error, relative to the largest expected value but at least to 1."""
    if expected.numel() == 0:
        return 0.0
    difference = (actual.double() - expected).abs()
    return float((difference / expected.abs().clamp(min=1.0)).max())

"""A case's tensors on a GPU, through torch."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from attention_cases import TOLERANCE, Case, error_of

from pipelive_kv.attention import paged_attention


def require_torch() -> None:
    """Skip where torch sees no GPU; the marker has seen to the driver and the build."""
    if not torch.cuda.is_available():
        pytest.skip(f"torch {torch.__version__} sees no CUDA device")


class GpuCase:
    """The same numbers and strides as a case of the host."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.kv = case.kv.cuda()
        assert self.kv.stride() == case.kv.stride()
        self.query = case.query.cuda()
        self.tables = case.tables.cuda()
        self.lens = case.lens.cuda()
        self.query_start = case.query_start.cuda()

    @property
    def options(self) -> dict[str, Any]:
        return {**self.case.options, "query_start": self.query_start}

    def run(self, **extra: Any) -> tuple[torch.Tensor, torch.Tensor]:
        options: dict[str, Any] = {**self.options, **extra}
        return paged_attention(
            self.query, self.kv, self.tables, self.lens, return_lse=True, **options
        )


def check(case: Case, **extra: Any) -> None:
    """Compare a case on the GPU with the float64 reference."""
    expected, expected_lse = case.expected()
    out, lse = GpuCase(case).run(**extra)
    assert out.dtype == case.query.dtype
    assert out.shape == case.query.shape
    assert out.is_cuda
    out, lse = out.cpu(), lse.cpu()
    assert not out.isnan().any()
    assert error_of(out, expected) < TOLERANCE[case.query.dtype]
    empty = expected_lse.isinf()
    assert torch.equal(lse == -math.inf, empty)
    limit = TOLERANCE[torch.float32] if case.query.dtype != torch.bfloat16 else 1e-3
    assert error_of(lse[~empty], expected_lse[~empty]) < limit

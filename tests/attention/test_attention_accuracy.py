"""Paged attention against a float64 reference, over permuted, poisoned caches."""

from __future__ import annotations

import math

import pytest
import torch
from attention_cases import TOLERANCE, Case, error_of
from hypothesis import given
from hypothesis import strategies as st

from pipelive_kv.attention import append, available_isas, paged_attention

ISAS = available_isas()
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def check(case: Case, **extra: object) -> None:
    expected, expected_lse = case.expected()
    out, lse = paged_attention(
        case.query, case.kv, case.tables, case.lens, return_lse=True, **case.options, **extra
    )
    assert out.dtype == case.query.dtype
    assert out.shape == case.query.shape
    assert not out.isnan().any()
    assert error_of(out, expected) < TOLERANCE[case.query.dtype]
    empty = expected_lse.isinf()
    assert torch.equal(lse == -math.inf, empty)
    assert error_of(lse[~empty], expected_lse[~empty]) < (
        TOLERANCE[torch.float32] if case.query.dtype != torch.bfloat16 else 1e-3
    )


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("group", [1, 2, 3, 4, 5, 7, 8, 16, 71])
def test_decode_with_any_group_size(isa: str, dtype: torch.dtype, group: int) -> None:
    check(
        Case(2 * group, 2, 64, 16, [1, 33, 130, 0, 700], [1, 1, 1, 1, 1], dtype, seed=group),
        isa=isa,
    )


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [*range(8, 65, 8), 72, 80, 96, 120, 128, 160, 192, 248, 256])
def test_every_kind_of_head_dim(isa: str, dtype: torch.dtype, head_dim: int) -> None:
    check(Case(3, 1, head_dim, 7, [50, 20], [1, 11], dtype, seed=head_dim), isa=isa)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("order", ["hnd", "nhd", "split"])
def test_long_context_in_every_memory_order(isa: str, dtype: torch.dtype, order: str) -> None:
    check(Case(4, 2, 64, 16, [2100, 513], [3, 1], dtype, order=order), isa=isa)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kv_dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_float32_query_over_16_bit_kv(isa: str, kv_dtype: torch.dtype) -> None:
    check(Case(6, 2, 40, 8, [100, 7], [20, 1], kv_dtype, query_dtype=torch.float32), isa=isa)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("soft_cap", [0.01, 1.0, 30.0, 1000.0])
def test_soft_cap_over_large_scores(isa: str, soft_cap: float) -> None:
    case = Case(4, 2, 64, 16, [300, 20], [5, 20], torch.float32, soft_cap=soft_cap, magnitude=20.0)
    check(case, isa=isa)


@pytest.mark.parametrize("isa", ISAS)
def test_scores_too_large_for_a_naive_exponential(isa: str) -> None:
    case = Case(2, 1, 32, 4, [90], [90], torch.float32)
    case.scale = 60.0
    expected, expected_lse = case.expected()
    out, lse = paged_attention(
        case.query, case.kv, case.tables, case.lens, return_lse=True, isa=isa, **case.options
    )
    # Scores of some hundreds carry an absolute error of their own last place.
    assert error_of(out, expected) < 1e-3
    assert error_of(lse, expected_lse) < 1e-5


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("window", [1, 2, 31, 32, 33, 200, 600, 5000])
def test_window_reads_nothing_before_it(isa: str, window: int) -> None:
    check(Case(4, 2, 32, 16, [1300, 40, 600], [70, 1, 1], torch.float32, window=window), isa=isa)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    kv_heads = draw(st.integers(1, 3))
    count = draw(st.integers(0, 4))
    seq_lens = draw(st.lists(st.integers(0, 600), min_size=count, max_size=count))
    query_lens = [
        draw(st.integers(0, min(n, 70))) if n else draw(st.integers(0, 2)) for n in seq_lens
    ]
    dtype = draw(st.sampled_from(DTYPES))
    return Case(
        q_heads=kv_heads * draw(st.integers(1, 9)),
        kv_heads=kv_heads,
        head_dim=8 * draw(st.integers(1, 12)),
        block_size=draw(st.sampled_from([1, 2, 3, 8, 16, 17, 64])),
        seq_lens=seq_lens,
        query_lens=query_lens,
        dtype=dtype,
        query_dtype=draw(st.sampled_from([dtype, torch.float32])),
        order=draw(st.sampled_from(["hnd", "nhd", "split"])),
        window=draw(st.sampled_from([0, 0, 1, 5, 32, 100])),
        soft_cap=draw(st.sampled_from([0.0, 0.0, 5.0, 50.0])),
        seed=draw(st.integers(0, 2**31)),
        spare_blocks=draw(st.integers(1, 5)),
    )


@given(case=cases(), isa=st.sampled_from(ISAS), threads=st.integers(1, 3))
def test_any_batch(case: Case, isa: str, threads: int) -> None:
    check(case, isa=isa, threads=threads)


@given(case=cases(), isa=st.sampled_from(ISAS))
def test_what_append_wrote_is_what_attention_reads(case: Case, isa: str) -> None:
    """A cache filled by append, in its chunks and in float32, gives the same bits."""
    poison = case.kv.clone(memory_format=torch.preserve_format)
    for seq, length in enumerate(case.seq_lens):
        first = max(0, length - case.query_lens[seq] - case.window + 1) if case.window else 0
        positions = torch.arange(first, length)
        blocks = case.tables[seq, positions // case.block_size].long()
        slots = blocks * case.block_size + positions % case.block_size
        poison[blocks, :, :, positions % case.block_size] = math.nan
        for part in torch.split(torch.arange(len(slots)), 37):
            append(
                poison,
                case.keys[seq][first:][part],
                case.values[seq][first:][part].float(),
                slots[part],
                isa=isa,
            )
    out = paged_attention(case.query, case.kv, case.tables, case.lens, isa=isa, **case.options)
    again = paged_attention(case.query, poison, case.tables, case.lens, isa=isa, **case.options)
    assert torch.equal(out, again)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("which", [0, 1])
def test_a_nan_that_is_attended_to_shows(isa: str, which: int) -> None:
    """The poison of the other tests would be seen."""
    case = Case(5, 1, 16, 4, [50], [20], torch.float32)
    case.kv[int(case.tables[0, 35 // 4]), 0, which, 35 % 4, 3] = math.nan
    out = paged_attention(case.query, case.kv, case.tables, case.lens, isa=isa, **case.options)
    saw = out.isnan().any(dim=2).all(dim=1)
    # Query row i is position 30 + i; position 35 is the sixth.
    assert saw.tolist() == [False] * 5 + [True] * 15
    assert not out[:5].isnan().any()


def test_numpy_in_numpy_out() -> None:
    case = Case(4, 2, 32, 8, [30, 9], [1, 1], torch.float16)
    expected = paged_attention(case.query, case.kv, case.tables, case.lens, scale=case.scale)
    out, lse = paged_attention(
        case.query.numpy(),
        case.kv.numpy(),
        case.tables.numpy(),
        case.lens.numpy(),
        scale=case.scale,
        return_lse=True,
    )
    assert type(out).__module__ == "numpy"
    assert lse.dtype == "float32"
    assert torch.equal(torch.from_numpy(out), expected)


def test_block_map_is_an_indirection() -> None:
    case = Case(4, 2, 32, 8, [30, 90], [3, 1], torch.bfloat16)
    expected = paged_attention(case.query, case.kv, case.tables, case.lens, **case.options)
    blocks = case.kv.shape[0]
    physical = torch.randperm(blocks)
    block_map = torch.full((2 * blocks,), -1, dtype=torch.int32)
    block_map[blocks:] = physical.to(torch.int32)
    moved = torch.empty_like(case.kv)
    moved[physical] = case.kv
    tables = torch.where(case.tables < 0, case.tables, case.tables + blocks)
    out = paged_attention(case.query, moved, tables, case.lens, block_map=block_map, **case.options)
    assert torch.equal(out, expected)


def test_rows_behind_the_last_sequence_become_zero() -> None:
    case = Case(4, 2, 32, 8, [30, 90], [3, 1], torch.float32)
    query = torch.cat([case.query, torch.full((2, 4, 32), math.nan)])
    out, lse = paged_attention(
        query, case.kv, case.tables, case.lens, return_lse=True, **case.options
    )
    expected = paged_attention(case.query, case.kv, case.tables, case.lens, **case.options)
    assert torch.equal(out[:4], expected)
    assert torch.equal(out[4:], torch.zeros(2, 4, 32))
    assert (lse[4:] == -math.inf).all()


def test_out_may_be_the_query_and_strided() -> None:
    case = Case(4, 2, 32, 8, [30, 2000], [3, 1], torch.float32)
    expected = paged_attention(case.query, case.kv, case.tables, case.lens, **case.options)
    packed = torch.full((4, 4, 3, 32), 7.0)
    packed[:, :, 1] = case.query
    query = packed[:, :, 1]
    returned = paged_attention(
        query, case.kv, case.tables, case.lens, out=query, threads=2, **case.options
    )
    assert returned is query
    assert torch.equal(query, expected)
    assert (packed[:, :, [0, 2]] == 7.0).all()

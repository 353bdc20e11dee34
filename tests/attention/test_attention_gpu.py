"""Paged attention on a GPU: the suites of the CPU, and what only a GPU has."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from attention_cases import TOLERANCE, Case, empty_kv, error_of
from gpu_cases import GpuCase, check, require_torch
from hypothesis import given, settings
from test_attention_accuracy import cases

from pipelive_kv.attention import append, check_block_tables, paged_attention
from pipelive_kv.errors import InvalidArgumentError, NotResidentError

pytestmark = pytest.mark.gpu
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(autouse=True)
def _torch_has_a_gpu() -> None:
    require_torch()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "group", [1, 2, 3, pytest.param(4, marks=pytest.mark.small), 5, 7, 8, 9, 16, 17, 32, 71]
)
def test_decode_with_any_group_size(dtype: torch.dtype, group: int) -> None:
    check(Case(2 * group, 2, 64, 16, [1, 33, 130, 0, 700], [1, 1, 1, 1, 1], dtype, seed=group))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [*range(8, 65, 8), 72, 80, 96, 120, 128, 160, 192, 248, 256])
@pytest.mark.parametrize("q_heads", [3, 24])
def test_every_kind_of_head_dim(dtype: torch.dtype, head_dim: int, q_heads: int) -> None:
    check(Case(q_heads, 1, head_dim, 7, [50, 20], [1, 11], dtype, seed=head_dim))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("order", ["hnd", "nhd", "split"])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_long_context_in_every_memory_order(dtype: torch.dtype, order: str, head_dim: int) -> None:
    check(Case(4, 2, head_dim, 16, [2100, 513], [3, 1], dtype, order=order))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_very_long_context(dtype: torch.dtype) -> None:
    check(Case(4, 1, 64, 32, [40000, 16400], [1, 40], dtype))


@pytest.mark.parametrize("kv_dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_float32_query_over_16_bit_kv(kv_dtype: torch.dtype) -> None:
    check(Case(6, 2, 40, 8, [100, 7], [20, 1], kv_dtype, query_dtype=torch.float32))


@pytest.mark.parametrize("soft_cap", [0.01, 1.0, 30.0, 1000.0])
def test_soft_cap_over_large_scores(soft_cap: float) -> None:
    lens = ([300, 20], [5, 20])
    check(Case(4, 2, 64, 16, *lens, torch.float32, soft_cap=soft_cap, magnitude=20.0))
    check(Case(4, 2, 64, 16, *lens, torch.bfloat16, soft_cap=soft_cap))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("window", [1, 2, 15, 16, 17, 33, 200, 600, 5000])
def test_window_reads_nothing_before_it(dtype: torch.dtype, window: int) -> None:
    check(Case(4, 2, 32, 16, [1300, 40, 600], [70, 1, 1], dtype, window=window))


@settings(max_examples=150, deadline=None)
@given(case=cases())
def test_any_batch(case: Case) -> None:
    check(case)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("window", [0, 300])
def test_company_and_chunks_change_nothing(dtype: torch.dtype, window: int) -> None:
    gpu = GpuCase(Case(6, 2, 64, 16, [3000, 50, 1030], [40, 5, 1], dtype, window=window))
    expected, expected_lse = gpu.run()
    for seq, row in [(0, 0), (0, 17), (0, 39), (1, 0), (1, 4), (2, 0)]:
        at = int(gpu.case.query_start[seq]) + row
        length = gpu.case.seq_lens[seq] - gpu.case.query_lens[seq] + row + 1
        out, lse = paged_attention(
            gpu.query[at : at + 1],
            gpu.kv,
            gpu.tables[seq : seq + 1],
            torch.tensor([length], dtype=torch.int32, device="cuda"),
            scale=gpu.case.scale,
            window=window,
            return_lse=True,
        )
        assert torch.equal(out[0], expected[at])
        assert torch.equal(lse[0], expected_lse[at])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_longest_split_grows_without_changing_bits(dtype: torch.dtype) -> None:
    gpu = GpuCase(Case(2, 1, 8, 64, [16400], [40], dtype))
    expected, _ = gpu.run()
    for row in (0, 22, 23, 24, 25, 39):
        lens = torch.tensor([16400 - 40 + row + 1], dtype=torch.int32, device="cuda")
        out = paged_attention(
            gpu.query[row : row + 1], gpu.kv, gpu.tables, lens, scale=gpu.case.scale
        )
        assert torch.equal(out[0], expected[row])


@pytest.mark.parametrize("order", ["nhd", "split"])
def test_placement_and_order_change_nothing(order: str) -> None:
    gpu = GpuCase(Case(6, 2, 64, 16, [900, 70], [40, 1], torch.bfloat16))
    expected, _ = gpu.run()
    blocks = gpu.kv.shape[0]
    where = torch.randperm(blocks, device="cuda")
    kv = empty_kv((blocks, 2, 16, 64), torch.bfloat16, order).cuda()
    kv[where] = gpu.kv
    moved = where[gpu.tables.clamp(min=0).long()].to(torch.int32)
    tables = torch.where(gpu.tables < 0, gpu.tables, moved)
    out = paged_attention(gpu.query, kv, tables, gpu.lens, **gpu.options)
    assert torch.equal(out, expected)


def test_twice_the_same_bits() -> None:
    gpu = GpuCase(Case(32, 8, 128, 16, [5000] * 16, [1] * 16, torch.bfloat16))
    expected, expected_lse = gpu.run()
    for _ in range(20):
        out, lse = gpu.run()
        assert torch.equal(out, expected)
        assert torch.equal(lse, expected_lse)


def test_block_map_is_an_indirection() -> None:
    gpu = GpuCase(Case(4, 2, 32, 8, [30, 90], [3, 1], torch.bfloat16))
    expected, _ = gpu.run()
    blocks = gpu.kv.shape[0]
    physical = torch.randperm(blocks, device="cuda")
    block_map = torch.full((2 * blocks,), -1, dtype=torch.int32, device="cuda")
    block_map[blocks:] = physical.to(torch.int32)
    moved = torch.empty_like(gpu.kv)
    moved[physical] = gpu.kv
    tables = torch.where(gpu.tables < 0, gpu.tables, gpu.tables + blocks)
    out = paged_attention(gpu.query, moved, tables, gpu.lens, block_map=block_map, **gpu.options)
    assert torch.equal(out, expected)


def test_rows_behind_the_last_sequence_become_zero() -> None:
    gpu = GpuCase(Case(4, 2, 32, 8, [30, 0, 90], [3, 2, 1], torch.float32))
    query = torch.cat([gpu.query, torch.full((2, 4, 32), math.nan, device="cuda")])
    out, lse = paged_attention(query, gpu.kv, gpu.tables, gpu.lens, return_lse=True, **gpu.options)
    expected, _ = gpu.run()
    assert torch.equal(out[:6], expected)
    assert torch.equal(out[6:], torch.zeros(2, 4, 32, device="cuda"))
    assert torch.equal(out[3:5], torch.zeros(2, 4, 32, device="cuda"))
    assert (lse[6:] == -math.inf).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("padding", [1, 8, 32])
def test_out_may_be_the_query_and_strided(dtype: torch.dtype, padding: int) -> None:
    """Also where rows are not aligned to anything but an element."""
    gpu = GpuCase(Case(4, 2, 32, 8, [30, 2000], [3, 1], dtype))
    expected, _ = gpu.run()
    packed = torch.full((4, 4, 32 + 2 * padding), 7.0, dtype=dtype, device="cuda")
    query = packed[:, :, padding : padding + 32]
    query.copy_(gpu.query)
    returned = paged_attention(query, gpu.kv, gpu.tables, gpu.lens, out=query, **gpu.options)
    assert returned is query
    assert torch.equal(query, expected)
    assert (packed[:, :, :padding] == 7.0).all()
    assert (packed[:, :, padding + 32 :] == 7.0).all()


def test_a_graph_follows_lengths_and_tables() -> None:
    """One capture; replays with other lengths, tables and queries, also empty sequences."""
    heads, dim, block, width, seqs = 8, 128, 16, 260, 6
    lens_of_steps = [[1] * 6, [4000, 1, 0, 513, 512, 17], [0] * 6, [700, 3999, 64, 65, 16, 4100]]
    device = {"device": "cuda"}
    steps = [
        Case(heads, 2, dim, block, lens, [1] * seqs, torch.bfloat16, seed=i)
        for i, lens in enumerate(lens_of_steps)
    ]
    blocks = max(case.kv.shape[0] for case in steps)
    kv = torch.empty((blocks, 2, 2, block, dim), dtype=torch.bfloat16, **device)
    query = torch.zeros((seqs, heads, dim), dtype=torch.bfloat16, **device)
    tables = torch.full((seqs, width), -1, dtype=torch.int32, **device)
    lens = torch.zeros(seqs, dtype=torch.int32, **device)
    out = torch.empty_like(query)

    def attend() -> Any:
        return paged_attention(
            query, kv, tables, lens, scale=steps[0].scale, out=out, return_lse=True
        )

    attend()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        _, lse = attend()
    for case in [*steps, *reversed(steps)]:
        kv.fill_(math.nan)
        kv[: case.kv.shape[0]].copy_(case.kv)
        query.copy_(case.query)
        lens.copy_(case.lens)
        tables.fill_(-1)
        tables[:, : case.tables.shape[1]].copy_(case.tables)
        out.fill_(math.nan)
        graph.replay()
        expected, expected_lse = case.expected()
        assert error_of(out.cpu(), expected) < TOLERANCE[torch.bfloat16]
        empty = expected_lse.isinf()
        assert torch.equal(lse.cpu() == -math.inf, empty)
        # The same bits as without a graph.
        again = attend()[0].clone()
        graph.replay()
        assert torch.equal(again, out)


def test_a_stream_of_ones_own() -> None:
    gpu = GpuCase(Case(8, 2, 64, 16, [3000, 500], [1, 1], torch.float16))
    expected, _ = gpu.run()
    stream = torch.cuda.Stream()
    for named in (stream, stream.cuda_stream):
        stream.wait_stream(torch.cuda.current_stream())
        out, _ = gpu.run(stream=named)
        torch.cuda.current_stream().wait_stream(stream)
        assert torch.equal(out, expected)
    with torch.cuda.stream(stream):
        out, _ = gpu.run()
    stream.synchronize()
    assert torch.equal(out, expected)


def test_tables_of_the_host_are_checked_and_copied() -> None:
    case = Case(4, 2, 32, 8, [30, 90], [3, 1], torch.bfloat16)
    gpu = GpuCase(case)
    expected, _ = gpu.run()
    out = paged_attention(gpu.query, gpu.kv, case.tables, case.lens, **case.options)
    assert torch.equal(out, expected)
    bad = case.tables.clone()
    bad[1, 2] = 1000
    with pytest.raises(InvalidArgumentError, match=r"block_tables\[1, 2\] is 1000"):
        paged_attention(gpu.query, gpu.kv, bad, case.lens, **case.options)
    with pytest.raises(InvalidArgumentError, match=r"seq_lens\[0\] is 2"):
        paged_attention(gpu.query, gpu.kv, case.tables, case.lens - 28, **case.options)
    with pytest.raises(InvalidArgumentError, match="seq_lens is on cpu, expected cuda:0"):
        paged_attention(gpu.query, gpu.kv, gpu.tables, case.lens, **gpu.options)


def test_wrong_numbers_on_the_device_are_found_and_stay_inside() -> None:
    gpu = GpuCase(Case(4, 2, 32, 8, [30, 90, 40], [3, 1, 2], torch.bfloat16))
    arguments = (gpu.query, gpu.kv, gpu.tables, gpu.lens)
    check_block_tables(*arguments, query_start=gpu.query_start)
    gpu.tables[1, 2] = 1 << 30
    with pytest.raises(InvalidArgumentError, match=r"block_tables\[1, 2\].*1 entries are wrong"):
        check_block_tables(*arguments, query_start=gpu.query_start)
    gpu.lens[2] = 1
    with pytest.raises(InvalidArgumentError, match="2 entries are wrong"):
        check_block_tables(*arguments, query_start=gpu.query_start)
    out, _ = gpu.run()
    nan = out.isnan().all(dim=2).all(dim=1)
    assert nan.tolist() == [False] * 3 + [True] * 3
    with pytest.raises(InvalidArgumentError, match="leads to no resident block"):
        check_block_tables(*arguments, query_start=gpu.query_start, resident=1)


@pytest.mark.parametrize("which", [0, 1])
def test_a_nan_that_is_attended_to_shows(which: int) -> None:
    case = Case(5, 1, 16, 4, [50], [20], torch.float32)
    case.kv[int(case.tables[0, 35 // 4]), 0, which, 35 % 4, 3] = math.nan
    out, _ = GpuCase(case).run()
    assert out.isnan().any(dim=2).all(dim=1).tolist() == [False] * 5 + [True] * 15


@pytest.mark.parametrize("order", ["hnd", "nhd"])
@pytest.mark.parametrize("stack", [1, 2])
def test_a_layer_of_a_pool_with_nothing_behind_its_blocks(order: Any, stack: int) -> None:
    """Pages beyond the capacity are not mapped: reading one token too far would fault."""
    from pipelive_kv.kv import KVPool
    from pipelive_kv.spec import KVSpec

    spec = KVSpec(8, 128, "bfloat16", 16, order)
    block_bytes = 8 * 2 * 16 * 128 * 2 * stack
    capacity = (2 << 20) // block_bytes * 4  # whole pages
    length = (capacity - 1) * 16 - 3
    case = Case(32, 8, 128, 16, [length], [1], torch.bfloat16, spare_blocks=1)
    expected, _ = case.expected()
    with KVPool(
        spec,
        num_layers=2,
        layers=(0, 1),
        max_blocks=4 * capacity,
        capacity=capacity,
        budget="1GiB",
        device="cuda",
        stack=stack,
    ) as pool:
        layer = pool.layer(1)
        # Block ids from the last one down: the sequence's end lies before the hole.
        tables = torch.arange(capacity - 1, 0, -1, dtype=torch.int32, device="cuda")[None]
        tables = tables.flip(1)
        slots = torch.arange(length, device="cuda")
        slots = tables[0].long()[slots // 16] * 16 + slots % 16
        append(layer, case.keys[0].cuda(), case.values[0].cuda(), slots)
        lens = case.lens.cuda()
        out = paged_attention(case.query.cuda(), layer, tables, lens, scale=case.scale)
        assert error_of(out.cpu(), expected) < TOLERANCE[torch.bfloat16]
        wider = torch.cat([tables, tables + capacity], dim=1)  # not resident, not needed
        again = paged_attention(case.query.cuda(), layer, wider, lens, scale=case.scale)
        assert torch.equal(again, out)
        check_block_tables(case.query.cuda(), layer, wider, lens)
        with pytest.raises(InvalidArgumentError, match="no resident block"):
            check_block_tables(case.query.cuda(), layer, wider, lens + 16)
        with pytest.raises(NotResidentError):
            paged_attention(case.query.cuda(), layer, wider.cpu(), case.lens + 16, scale=case.scale)


def test_cupy_in_cupy_out() -> None:
    cupy = pytest.importorskip("cupy")
    case = Case(4, 2, 32, 8, [30, 900], [1, 1], torch.float16)
    gpu = GpuCase(case)
    expected, _ = gpu.run()
    arrays = [cupy.from_dlpack(t) for t in (gpu.query, gpu.kv, gpu.tables, gpu.lens)]
    torch.cuda.synchronize()
    for stream in (None, cupy.cuda.Stream(non_blocking=True)):
        out, lse = paged_attention(*arrays, scale=case.scale, return_lse=True, stream=stream)
        (stream or cupy.cuda.get_current_stream()).synchronize()
        assert type(out).__module__.startswith("cupy")
        assert lse.dtype == "float32"
        assert torch.equal(torch.from_dlpack(out), expected)

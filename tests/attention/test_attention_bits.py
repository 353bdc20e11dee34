"""A token's bits depend on its own query, KV and position alone."""

from __future__ import annotations

import multiprocessing
import threading

import pytest
import torch
from attention_cases import Case, empty_kv
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelive_kv.attention import available_isas, paged_attention

ISAS = available_isas()
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def run(case: Case, **extra: object) -> tuple[torch.Tensor, torch.Tensor]:
    return paged_attention(
        case.query, case.kv, case.tables, case.lens, return_lse=True, **(case.options | extra)
    )


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("lens", [[3000], [700, 5, 2500], [600] * 9], ids=str)
@pytest.mark.parametrize("query_len", [1, 5])
def test_threads_change_nothing(
    isa: str, dtype: torch.dtype, lens: list[int], query_len: int
) -> None:
    case = Case(6, 2, 64, 16, lens, [query_len] * len(lens), dtype)
    expected, expected_lse = run(case, isa=isa, threads=1)
    for threads in (2, 3, 4, 64):
        out, lse = run(case, isa=isa, threads=threads)
        assert torch.equal(out, expected)
        assert torch.equal(lse, expected_lse)


@settings(max_examples=60, deadline=None)
@given(
    isa=st.sampled_from(ISAS),
    dtype=st.sampled_from(DTYPES),
    group=st.integers(1, 6),
    block_size=st.sampled_from([1, 3, 16]),
    lens=st.lists(st.integers(1, 1500), min_size=2, max_size=4),
    window=st.sampled_from([0, 0, 40, 700]),
    data=st.data(),
)
def test_company_and_chunks_change_nothing(
    *,
    isa: str,
    dtype: torch.dtype,
    group: int,
    block_size: int,
    lens: list[int],
    window: int,
    data: st.DataObject,
) -> None:
    query_lens = [min(n, data.draw(st.integers(1, 40))) for n in lens]
    case = Case(2 * group, 2, 40, block_size, lens, query_lens, dtype, window=window)
    expected, expected_lse = run(case, isa=isa, threads=2)
    for seq, length in enumerate(lens):
        first = int(case.query_start[seq])
        for row in range(query_lens[seq]):
            # The row alone, as a decode step when the sequence was shorter.
            out, lse = paged_attention(
                case.query[first + row : first + row + 1],
                case.kv,
                case.tables[seq : seq + 1],
                torch.tensor([length - query_lens[seq] + row + 1], dtype=torch.int32),
                scale=case.scale,
                window=window,
                return_lse=True,
                threads=1,
                isa=isa,
            )
            assert torch.equal(out[0], expected[first + row])
            assert torch.equal(lse[0], expected_lse[first + row])


@pytest.mark.parametrize("isa", ISAS)
def test_the_longest_split_grows_without_changing_bits(isa: str) -> None:
    """Positions on both sides of 16384, where splits become longer, in one chunk and alone."""
    case = Case(2, 1, 8, 64, [16400], [40], torch.float32)
    expected, _ = run(case, isa=isa, threads=1)
    assert torch.equal(run(case, isa=isa, threads=4)[0], expected)
    for row in (0, 22, 23, 24, 25, 39):
        out = paged_attention(
            case.query[row : row + 1],
            case.kv,
            case.tables,
            torch.tensor([16400 - 40 + row + 1], dtype=torch.int32),
            scale=case.scale,
            isa=isa,
        )
        assert torch.equal(out[0], expected[row])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("order", ["nhd", "split"])
def test_placement_and_order_change_nothing(isa: str, order: str) -> None:
    case = Case(6, 2, 64, 16, [900, 70], [40, 1], torch.bfloat16)
    expected, _ = run(case, isa=isa)
    blocks = case.kv.shape[0]
    where = torch.randperm(blocks)
    kv = empty_kv((blocks, 2, 16, 64), torch.bfloat16, order)
    kv[where] = case.kv
    tables = torch.where(
        case.tables < 0, case.tables, where[case.tables.clamp(min=0).long()].to(torch.int32)
    )
    out = paged_attention(case.query, kv, tables, case.lens, isa=isa, **case.options)
    assert torch.equal(out, expected)


def test_several_python_threads_at_once() -> None:
    case = Case(8, 2, 64, 16, [3000, 500], [1, 1], torch.float32)
    expected, _ = run(case, threads=1)
    results: list[torch.Tensor] = []

    def work() -> None:
        for _ in range(20):
            results.append(run(case, threads=3)[0])

    workers = [threading.Thread(target=work) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(results) == 60
    assert all(torch.equal(result, expected) for result in results)


def _attend_in_child(queue: object, threads: int) -> None:
    torch.set_num_threads(1)  # torch's own pool does not outlive a fork
    case = Case(8, 2, 64, 16, [3000, 500], [1, 1], torch.float32)
    out, _ = run(case, threads=threads)
    queue.put(out.numpy().tobytes())  # type: ignore[attr-defined]


def test_a_forked_child_makes_its_own_pool() -> None:
    torch.set_num_threads(1)
    case = Case(8, 2, 64, 16, [3000, 500], [1, 1], torch.float32)
    expected, _ = run(case, threads=3)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_attend_in_child, args=(queue, 3))
    child.start()
    got = queue.get(timeout=60)
    child.join(timeout=60)
    assert child.exitcode == 0
    assert got == expected.numpy().tobytes()

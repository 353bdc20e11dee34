"""Memory behind blocks that are not attended to is not touched: it is not even readable."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Iterator
from typing import Any, Literal

import pytest
import torch
from attention_cases import Case

from pipelive_kv.attention import append, available_isas, paged_attention
from pipelive_kv.errors import ClosedError, InvalidArgumentError, NotResidentError
from pipelive_kv.kv import KVPool
from pipelive_kv.spec import KVSpec

PAGE = mmap.PAGESIZE
LIBC = ctypes.CDLL(None, use_errno=True)


class Guarded:
    """A float32 cache in which every block is a page of its own, and can be locked."""

    def __init__(self, blocks: int, kv_heads: int, block_size: int, head_dim: int) -> None:
        elements = kv_heads * 2 * block_size * head_dim
        assert elements * 4 == PAGE
        self.memory = mmap.mmap(-1, blocks * PAGE)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
        flat = torch.frombuffer(self.memory, dtype=torch.float32)
        self.kv = flat.view(blocks, kv_heads, 2, block_size, head_dim)

    def protect(self, block: int, how: int) -> None:
        address = ctypes.c_void_p(self.address + block * PAGE)
        if LIBC.mprotect(address, ctypes.c_size_t(PAGE), ctypes.c_int(how)) != 0:
            raise OSError(ctypes.get_errno(), "mprotect")

    def unlock(self) -> None:
        for block in range(self.kv.shape[0]):
            self.protect(block, mmap.PROT_READ | mmap.PROT_WRITE)


@pytest.fixture
def guarded() -> Iterator[Guarded]:
    made = Guarded(blocks=80, kv_heads=2, block_size=16, head_dim=16)
    yield made
    made.unlock()


@pytest.mark.parametrize("isa", available_isas())
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("window", [0, 1, 20, 33])
@pytest.mark.parametrize("query_lens", [[1, 1, 1, 1], [33, 1, 40, 0]], ids=str)
def test_only_blocks_attended_to_are_read(
    guarded: Guarded, isa: str, threads: int, window: int, query_lens: list[int]
) -> None:
    case = Case(
        6, 2, 16, 16, [500, 16, 129, 300], query_lens, torch.float32, window=window, spare_blocks=10
    )
    expected, _ = case.expected()
    blocks = case.kv.shape[0]
    guarded.kv[:blocks] = case.kv
    used = set()
    for seq, (length, count) in enumerate(zip(case.seq_lens, query_lens, strict=True)):
        if count == 0:
            continue
        first = max(0, length - count - window + 1) if window else 0
        used |= set(case.tables[seq, first // 16 : -(-length // 16)].tolist())
    for block in range(80):
        if block not in used:
            guarded.protect(block, 0)
    out = paged_attention(
        case.query, guarded.kv, case.tables, case.lens, isa=isa, threads=threads, **case.options
    )
    torch.testing.assert_close(out.double(), expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("isa", available_isas())
def test_append_touches_only_the_blocks_of_its_slots(guarded: Guarded, isa: str) -> None:
    for block in range(80):
        if block not in (3, 79):
            guarded.protect(block, 0)
    tokens = torch.randn(4, 2, 16)
    append(guarded.kv, tokens, tokens, torch.tensor([48, 63, -1, 1279]), isa=isa)
    assert torch.equal(guarded.kv[3, :, 0, 0], tokens[0])
    assert torch.equal(guarded.kv[3, :, 1, 15], tokens[1])
    assert torch.equal(guarded.kv[79, :, 0, 15], tokens[3])


@pytest.mark.parametrize("isa", available_isas())
def test_a_refused_call_touches_nothing(guarded: Guarded, isa: str) -> None:
    for block in range(80):
        guarded.protect(block, 0)
    tokens = torch.randn(2, 2, 16)
    with pytest.raises(ValueError, match=r"slots\[1\]"):
        append(guarded.kv, tokens, tokens, torch.tensor([48, 1280]), isa=isa)
    with pytest.raises(ValueError, match=r"block_tables\[1, 0\]"):
        paged_attention(
            tokens,
            guarded.kv,
            torch.tensor([[1], [80]], dtype=torch.int32),
            torch.tensor([5, 5], dtype=torch.int32),
            scale=1.0,
            isa=isa,
        )


def make_pool(order: Literal["hnd", "nhd"] = "hnd", *, capacity: int = 4, stack: int = 1) -> KVPool:
    spec = KVSpec(num_kv_heads=2, head_dim=16, dtype="float32", block_size=4, order=order)
    return KVPool(
        spec,
        num_layers=4,
        layers=(0, 1),
        max_blocks=64,
        capacity=capacity,
        budget=64 << 20,
        stack=stack,
    )


def attend(pool: KVPool, layer: int, blocks: list[int], length: int, **extra: Any) -> torch.Tensor:
    return paged_attention(
        torch.ones(1, 4, 16),
        pool.layer(layer),
        torch.tensor([blocks], dtype=torch.int32),
        torch.tensor([length], dtype=torch.int32),
        scale=0.25,
        **extra,
    )


@pytest.mark.parametrize("order", ["hnd", "nhd"])
@pytest.mark.parametrize("stack", [1, 2])
def test_a_layer_of_a_pool_is_what_a_tensor_is(order: Literal["hnd", "nhd"], stack: int) -> None:
    case = Case(4, 2, 16, 4, [70, 9, 33], [20, 1, 5], torch.float32, spare_blocks=2)
    expected = paged_attention(case.query, case.kv, case.tables, case.lens, **case.options)
    with make_pool(order, capacity=40, stack=stack) as pool:
        layer = pool.layer(1)
        for block in range(case.kv.shape[0]):
            tokens = case.kv[block].permute(2, 1, 0, 3)  # [token, 2, head, dim]
            slots = torch.arange(4) + 4 * block
            append(layer, tokens[:, 0], tokens[:, 1], slots)
        out = paged_attention(case.query, layer, case.tables, case.lens, **case.options)
        assert torch.equal(out, expected)
        with pytest.raises(InvalidArgumentError, match="out is memory that overlaps kv"):
            paged_attention(
                case.query,
                layer,
                case.tables,
                case.lens,
                out=torch.from_dlpack(layer)[:26, 0, 0, :4],
                **case.options,
            )


def test_a_block_that_is_not_resident_is_refused() -> None:
    with make_pool(capacity=4) as pool:
        tokens = torch.ones(2, 2, 16)
        layer = pool.layer(0)
        append(layer, tokens, tokens, torch.tensor([4, 15]))
        before = torch.from_dlpack(layer)[:4].clone()
        with pytest.raises(NotResidentError, match="4"):
            append(layer, tokens * 2, tokens * 2, torch.tensor([5, 16]))
        with pytest.raises(InvalidArgumentError, match=r"slots\[1\] is 256"):
            append(layer, tokens * 2, tokens * 2, torch.tensor([5, 256]))
        assert torch.equal(torch.from_dlpack(layer)[:4], before)
        with pytest.raises(NotResidentError, match="layer 2"):
            append(pool.layer(2), tokens, tokens, torch.tensor([4, 5]))

        assert not attend(pool, 0, [1, 2, 3, 4], 12).isnan().any()
        with pytest.raises(NotResidentError, match="4"):
            attend(pool, 0, [1, 2, 3, 4], 13)
        # Before the window and behind the length anything may stand.
        assert not attend(pool, 0, [60, 2, 3, 61], 12, window=8).isnan().any()
        with pytest.raises(NotResidentError, match="60"):
            attend(pool, 0, [60, 2, 3, 61], 12, window=9)
        # The physical block counts, not the id.
        down = torch.arange(64, dtype=torch.int32) % 4
        assert not attend(pool, 0, [60, 62, 63], 12, block_map=down).isnan().any()
        up = torch.arange(64, dtype=torch.int32) + 3
        with pytest.raises(NotResidentError, match="5"):
            attend(pool, 0, [0, 2], 8, block_map=up[:3])


def test_a_pool_that_shrinks_grows_and_closes() -> None:
    pool = make_pool(capacity=8)
    assert not attend(pool, 0, [7], 4).isnan().any()
    pool.shrink(7, live=[0])
    with pytest.raises(NotResidentError):
        attend(pool, 0, [7], 4)
    pool.grow(8)
    assert not attend(pool, 0, [7], 4).isnan().any()
    layer = pool.layer(0)
    pool.close()
    with pytest.raises(ClosedError):
        append(layer, torch.ones(1, 2, 16), torch.ones(1, 2, 16), torch.tensor([0]))

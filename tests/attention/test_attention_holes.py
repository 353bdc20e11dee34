"""Memory behind blocks that are not attended to is not touched: it is not even readable."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Iterator

import pytest
import torch
from attention_cases import Case

from pipelive_kv.attention import append, available_isas, paged_attention

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

"""Bad input raises, names the argument, and leaves everything as it was."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from attention_cases import empty_kv

from pipelive_kv.attention import append, available_isas, paged_attention
from pipelive_kv.errors import InvalidArgumentError, PipeliveError

INT32_MAX = 2**31 - 1


def int32(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def attention_arguments(**changes: Any) -> dict[str, Any]:
    """Two sequences of 20 and 9 tokens, 3 and 1 of them queries; blocks of 8 tokens."""
    arguments: dict[str, Any] = {
        "query": torch.ones(4, 4, 16),
        "kv": torch.ones(6, 2, 2, 8, 16),
        "block_tables": torch.tensor([[1, 2, 3], [4, 5, -1]], dtype=torch.int32),
        "seq_lens": int32(20, 9),
        "query_start": int32(0, 3, 4),
        "scale": 0.25,
        "out": torch.full((4, 4, 16), 7.0),
    }
    return arguments | changes


BAD_ATTENTION: list[tuple[str, dict[str, Any], str]] = [
    ("query of two axes", {"query": torch.ones(4, 64)}, "query"),
    ("query of another head_dim", {"query": torch.ones(4, 4, 8)}, "query: head_dim"),
    (
        "query heads no multiple",
        {"query": torch.ones(4, 3, 16), "out": torch.ones(4, 3, 16)},
        "query: number of heads",
    ),
    (
        "query without heads",
        {"query": torch.ones(4, 0, 16), "out": torch.ones(4, 0, 16)},
        "query: number of heads",
    ),
    (
        "query of another dtype",
        {"query": torch.ones(4, 4, 16, dtype=torch.float16)},
        "query: dtype",
    ),
    ("query of float64", {"query": torch.ones(4, 4, 16, dtype=torch.float64)}, "query: dtype"),
    (
        "query not contiguous in its last axis",
        {"query": torch.ones(4, 16, 4).transpose(1, 2)},
        "query: stride",
    ),
    ("kv of four axes", {"kv": torch.ones(6, 2, 8, 16)}, "kv"),
    ("kv with one side", {"kv": torch.ones(6, 2, 1, 8, 16)}, "kv"),
    ("kv without blocks", {"kv": torch.ones(0, 2, 2, 8, 16)}, "kv"),
    ("kv of integers", {"kv": torch.ones(6, 2, 2, 8, 16, dtype=torch.int32)}, "kv: dtype"),
    ("kv not contiguous", {"kv": torch.ones(6, 2, 2, 16, 8).transpose(3, 4)}, "kv: stride"),
    (
        "head_dim no multiple of 8",
        {
            "kv": torch.ones(6, 2, 2, 8, 12),
            "query": torch.ones(4, 4, 12),
            "out": torch.ones(4, 4, 12),
        },
        "kv: head_dim",
    ),
    (
        "head_dim above 256",
        {
            "kv": torch.ones(6, 2, 2, 8, 264),
            "query": torch.ones(4, 4, 264),
            "out": torch.ones(4, 4, 264),
        },
        "kv: head_dim",
    ),
    ("tables of int64", {"block_tables": torch.zeros(2, 3, dtype=torch.int64)}, "block_tables"),
    ("tables of one axis", {"block_tables": int32(1, 2, 3)}, "block_tables"),
    (
        "tables transposed",
        {"block_tables": torch.zeros(3, 2, dtype=torch.int32).T},
        "block_tables: stride",
    ),
    (
        "tables of three sequences",
        {"block_tables": torch.zeros(3, 3, dtype=torch.int32)},
        "seq_lens",
    ),
    (
        "a negative block",
        {"block_tables": torch.tensor([[1, -1, 3], [4, 5, 0]], dtype=torch.int32)},
        r"block_tables\[0, 1\] is -1",
    ),
    (
        "a block beyond kv",
        {"block_tables": torch.tensor([[1, 2, 3], [4, 6, 0]], dtype=torch.int32)},
        r"block_tables\[1, 1\] is 6",
    ),
    (
        "a huge block",
        {"block_tables": torch.tensor([[1, 2, INT32_MAX], [4, 5, 0]], dtype=torch.int32)},
        r"block_tables\[0, 2\]",
    ),
    ("lengths of int64", {"seq_lens": torch.tensor([20, 9])}, "seq_lens"),
    ("too few lengths", {"seq_lens": int32(20)}, "seq_lens"),
    ("a negative length", {"seq_lens": int32(20, -1)}, r"seq_lens\[1\] is -1"),
    ("a length beyond the table", {"seq_lens": int32(25, 9)}, r"seq_lens\[0\] is 25"),
    ("the largest length", {"seq_lens": int32(INT32_MAX, 9)}, r"seq_lens\[0\]"),
    ("a length below the query's", {"seq_lens": int32(2, 9)}, r"seq_lens\[0\] is 2"),
    ("starts of int64", {"query_start": torch.tensor([0, 3, 4])}, "query_start"),
    ("too few starts", {"query_start": int32(0, 4)}, "query_start"),
    ("starts not from 0", {"query_start": int32(1, 3, 4)}, r"query_start\[0\] is 1"),
    ("starts that descend", {"query_start": int32(0, 3, 2)}, r"query_start\[2\] is 2"),
    ("starts beyond the query", {"query_start": int32(0, 3, 5)}, r"query_start\[2\] is 5"),
    ("a negative start", {"query_start": int32(0, -1, 4)}, r"query_start\[1\] is -1"),
    ("no starts, other number of tokens", {"query_start": None}, "query: number of tokens"),
    ("scale NaN", {"scale": math.nan}, "scale"),
    ("scale infinite", {"scale": math.inf}, "scale"),
    ("scale beyond float", {"scale": 1e300}, "scale"),
    ("a negative window", {"window": -1}, "window is -1"),
    ("a negative soft cap", {"soft_cap": -1.0}, "soft_cap"),
    ("soft cap NaN", {"soft_cap": math.nan}, "soft_cap"),
    ("a tiny soft cap", {"soft_cap": 1e-30}, "soft_cap"),
    ("no threads", {"threads": 0}, "threads is 0"),
    ("negative threads", {"threads": -1}, "threads is -1"),
    ("too many threads", {"threads": 1025}, "threads is 1025"),
    ("an unknown isa", {"isa": "sse9"}, 'isa is "sse9"'),
    ("an empty map", {"block_map": int32()}, "block_map"),
    ("a map of int64", {"block_map": torch.arange(6)}, "block_map"),
    ("a block beyond the map", {"block_map": int32(0, 1, 2, 3, 4)}, r"block_tables\[1, 1\] is 5"),
    ("a map to nowhere", {"block_map": int32(0, 1, 2, 6, 4, 5)}, r"block_map\[3\] is 6"),
    ("a map to a negative block", {"block_map": int32(0, 1, 2, 3, 4, -1)}, r"block_map\[5\] is -1"),
    ("out of another shape", {"out": torch.ones(3, 4, 16)}, "out: shape"),
    ("out of another dtype", {"out": torch.ones(4, 4, 16, dtype=torch.bfloat16)}, "out: dtype"),
    ("out with shared elements", {"out": torch.ones(1, 4, 16).expand(4, 4, 16)}, "out: strides"),
]


@pytest.mark.parametrize(
    ("changes", "message"), [c[1:] for c in BAD_ATTENTION], ids=[c[0] for c in BAD_ATTENTION]
)
def test_bad_attention_arguments(changes: dict[str, Any], message: str) -> None:
    arguments = attention_arguments(**changes)
    before = arguments["out"].clone()
    with pytest.raises(InvalidArgumentError, match=message):
        paged_attention(**arguments)
    assert torch.equal(arguments["out"], before)


def test_the_arguments_that_the_bad_ones_start_from_are_good() -> None:
    out = paged_attention(**attention_arguments())
    torch.testing.assert_close(out, torch.ones(4, 4, 16))


def test_out_that_overlaps_an_input() -> None:
    memory = torch.ones(5, 4, 16)
    with pytest.raises(InvalidArgumentError, match="out is memory that overlaps query"):
        paged_attention(**attention_arguments(query=memory[:4], out=memory[1:]))
    kv = torch.ones(6, 2, 2, 8, 16)
    with pytest.raises(InvalidArgumentError, match="out is memory that overlaps kv"):
        paged_attention(**attention_arguments(kv=kv, out=kv[5].view(-1)[:256].view(4, 4, 16)))


def test_read_only_out() -> None:
    arguments = {
        name: value.numpy() if isinstance(value, torch.Tensor) else value
        for name, value in attention_arguments().items()
    }
    out = arguments["out"]
    out.flags.writeable = False
    with pytest.raises((PipeliveError, BufferError)):
        paged_attention(**arguments)
    assert (out == 7.0).all()


@pytest.mark.parametrize(
    "name", ["query", "kv", "block_tables", "seq_lens", "query_start", "out", "block_map"]
)
@pytest.mark.parametrize("value", ["text", 3, object()])
def test_what_is_no_tensor(name: str, value: object) -> None:
    with pytest.raises((TypeError, InvalidArgumentError)):
        paged_attention(**attention_arguments(**{name: value}))


def test_a_query_of_unknown_kind_without_out() -> None:
    arguments = attention_arguments(query=memoryview(np.ones((4, 4, 16), np.float32)), out=None)
    with pytest.raises(TypeError, match="query"):
        paged_attention(**arguments)


def append_arguments(**changes: Any) -> dict[str, Any]:
    arguments: dict[str, Any] = {
        "kv": torch.full((6, 2, 2, 8, 16), 7.0),
        "key": torch.ones(3, 2, 16),
        "value": torch.ones(3, 2, 16),
        "slots": torch.tensor([9, -1, 47]),
    }
    return arguments | changes


BAD_APPEND: list[tuple[str, dict[str, Any], str]] = [
    ("kv of four axes", {"kv": torch.ones(6, 2, 8, 16)}, "kv"),
    ("kv of integers", {"kv": torch.ones(6, 2, 2, 8, 16, dtype=torch.int16)}, "kv: dtype"),
    (
        "kv with shared elements",
        {"kv": torch.ones(1, 2, 2, 8, 16).expand(6, 2, 2, 8, 16)},
        "kv: block stride",
    ),
    (
        "kv with shared heads",
        {"kv": torch.ones(6, 1, 2, 8, 16).expand(6, 2, 2, 8, 16)},
        "kv: head stride",
    ),
    ("key of two axes", {"key": torch.ones(3, 32)}, "key"),
    ("key of too few tokens", {"key": torch.ones(2, 2, 16)}, "key: number of tokens"),
    ("key of too many heads", {"key": torch.ones(3, 3, 16)}, "key: number of heads"),
    ("key of another head_dim", {"key": torch.ones(3, 2, 24)}, "key: head_dim"),
    ("key of another dtype", {"key": torch.ones(3, 2, 16, dtype=torch.bfloat16)}, "key: dtype"),
    ("key not contiguous", {"key": torch.ones(3, 16, 2).transpose(1, 2)}, "key: stride"),
    ("value of too many tokens", {"value": torch.ones(4, 2, 16)}, "value: number of tokens"),
    ("value of too few heads", {"value": torch.ones(3, 1, 16)}, "value: number of heads"),
    ("value of another head_dim", {"value": torch.ones(3, 2, 8)}, "value: head_dim"),
    ("value of float64", {"value": torch.ones(3, 2, 16, dtype=torch.float64)}, "value: dtype"),
    ("slots of int32", {"slots": torch.tensor([9, -1, 47], dtype=torch.int32)}, "slots"),
    ("slots of two axes", {"slots": torch.tensor([[9, -1, 47]])}, "slots"),
    ("slots strided", {"slots": torch.tensor([9, 0, -1, 0, 47])[::2]}, "slots"),
    ("a slot below -1", {"slots": torch.tensor([9, -2, 47])}, r"slots\[1\] is -2"),
    ("a slot beyond kv", {"slots": torch.tensor([9, -1, 48])}, r"slots\[2\] is 48"),
    ("a huge slot", {"slots": torch.tensor([2**62, -1, 4])}, r"slots\[0\]"),
    ("the lowest slot", {"slots": torch.tensor([-(2**63), -1, 4])}, r"slots\[0\]"),
    ("an unknown isa", {"isa": "mmx"}, 'isa is "mmx"'),
]


@pytest.mark.parametrize(
    ("changes", "message"), [c[1:] for c in BAD_APPEND], ids=[c[0] for c in BAD_APPEND]
)
def test_bad_append_arguments(changes: dict[str, Any], message: str) -> None:
    arguments = append_arguments(**changes)
    before = arguments["kv"].clone()
    with pytest.raises(InvalidArgumentError, match=message):
        append(**arguments)
    assert torch.equal(arguments["kv"], before)


def test_key_that_overlaps_kv() -> None:
    kv = torch.full((6, 2, 2, 8, 16), 7.0)
    with pytest.raises(InvalidArgumentError, match="value is memory that overlaps kv"):
        append(**append_arguments(kv=kv, value=kv.view(-1)[:96].view(3, 2, 16)))


@pytest.mark.parametrize("name", ["kv", "key", "value", "slots"])
def test_append_of_what_is_no_tensor(name: str) -> None:
    with pytest.raises((TypeError, InvalidArgumentError)):
        append(**append_arguments(**{name: object()}))


@pytest.mark.parametrize("isa", available_isas())
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("order", ["hnd", "nhd", "split"])
def test_append_writes_its_slots_and_nothing_else(isa: str, dtype: torch.dtype, order: str) -> None:
    kv = empty_kv((6, 3, 5, 24), dtype, order)
    kv.fill_(7.0)
    packed = torch.randn(4, 2, 3, 24)
    slots = torch.tensor([29, 0, -1, 13])
    append(kv, packed[:, 0], packed[:, 1].to(dtype), slots, isa=isa)
    expected = torch.full((30, 3, 2, 24), 7.0).to(dtype)
    for token in (0, 1, 3):
        expected[slots[token]] = packed[token].transpose(0, 1).to(dtype)
    assert torch.equal(kv.permute(0, 3, 1, 2, 4).reshape(30, 3, 2, 24), expected)


def test_the_later_of_two_tokens_stays() -> None:
    kv = torch.zeros(2, 1, 2, 4, 8)
    key = torch.arange(3.0)[:, None, None].expand(3, 1, 8).contiguous()
    append(kv, key, key, torch.tensor([5, 2, 5]))
    assert kv[1, 0, :, 1].eq(2.0).all()
    assert kv[0, 0, :, 2].eq(1.0).all()
    assert kv.sum() == 2 * 8 * 3.0


@pytest.mark.parametrize("isa", available_isas())
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_rounding_is_to_nearest_even_for_every_kind_of_number(isa: str, dtype: torch.dtype) -> None:
    patterns = torch.arange(0, 2**32, 65521 * 13, dtype=torch.int64)
    exact = torch.arange(0, 2**16, dtype=torch.int32).to(torch.int16).view(dtype).float()
    halfway = torch.nextafter(exact, torch.tensor(math.inf))
    edge = torch.tensor(
        [
            0.0,
            -0.0,
            math.inf,
            -math.inf,
            math.nan,
            65504.0,
            65519.99,
            65520.0,
            2**-24,
            2**-25,
            3 * 2**-26,
            -(2**-25),
            1e-40,
            3.4e38,
        ]
    )
    ties = exact + (torch.nextafter(exact, torch.tensor(math.inf)) - exact) / 2
    values = torch.cat(
        [
            patterns.to(torch.int32).view(torch.float32),
            exact,
            halfway,
            ties,
            edge,
            exact * (1 + 2**-9),
            exact * (1 + 2**-12),
        ]
    )
    values = torch.cat([values, torch.zeros(-len(values) % 8)])
    tokens = len(values) // 8
    kv = torch.zeros(tokens, 1, 2, 1, 8, dtype=dtype)
    source = values.view(tokens, 1, 8)
    append(kv, source, source, torch.arange(tokens), isa=isa)
    got = kv[:, 0, 0, 0].reshape(-1)
    expected = values.to(dtype)
    nan = expected.isnan()
    assert torch.equal(got.isnan(), nan)
    assert torch.equal(got[~nan].view(torch.int16), expected[~nan].view(torch.int16))

"""Where the tensors of a call must lie, without a GPU: on the fake driver."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests.cuda_fake import FakeCuda

from pipelive_kv import _core, cuda_arrays
from pipelive_kv.attention import check_block_tables, paged_attention
from pipelive_kv.errors import InvalidArgumentError, NotResidentError, PipeliveError
from pipelive_kv.kv import KVPool
from pipelive_kv.memory import Arena, PagePool
from pipelive_kv.spec import KVSpec

PAGE = 1 << 16
SPEC = KVSpec(2, 16, "bfloat16", 8)


class Setup:
    """A pool of four resident blocks and tensors beside it on the fake device."""

    def __init__(self, fake: FakeCuda) -> None:
        self.pages = PagePool(64 * PAGE, page_bytes=PAGE, device=fake.device())
        self.pool = KVPool(
            SPEC, num_layers=1, layers=(0,), max_blocks=64, capacity=4, page_pool=self.pages
        )
        self.arena = Arena(self.pages, 4 * PAGE)
        self.arena.map(0, 4 * PAGE)
        self.query = self.arena.tensor(0, (2, 4, 16), "bfloat16")
        self.out = self.arena.tensor(PAGE, (2, 4, 16), "bfloat16")
        self.tables = self.arena.tensor(2 * PAGE, (2, 3), "int32")
        self.lens = self.arena.tensor(3 * PAGE, (2,), "int32")

    def forward(self, **changes: Any) -> None:
        arguments: dict[str, Any] = {
            "query": self.query,
            "kv": self.pool.layer(0),
            "block_tables": self.tables,
            "seq_lens": self.lens,
            "out": self.out,
            "lse": None,
            "scale": 1.0,
        }
        _core.attention_forward(**(arguments | changes))

    def validate(self, tables: torch.Tensor, lens: torch.Tensor) -> None:
        _core.attention_validate(
            self.query, self.pool.layer(0), tables, lens, self.out, 1.0, None, 0, 0.0, None
        )


@pytest.fixture
def setup() -> Iterator[Setup]:
    fake = FakeCuda(page_bytes=PAGE)
    made = Setup(fake)
    yield made
    made.arena.close()
    made.pool.close()
    made.pages.close()
    del made
    _core.cuda_forget_kernels()
    gc.collect()
    assert fake.mistakes == ""


def int32(values: list[Any]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def test_everything_lies_where_kv_lies(setup: Setup) -> None:
    host = torch.zeros(2, 4, 16, dtype=torch.bfloat16)
    for name, tensor in [
        ("query", host),
        ("out", host),
        ("block_tables", int32([[1, 2, 3]] * 2)),
        ("seq_lens", int32([1, 2])),
        ("lse", torch.zeros(2, 4)),
        ("block_map", int32([1])),
        ("query_start", int32([0, 1, 2])),
    ]:
        with pytest.raises(InvalidArgumentError, match=f"{name} is on cpu, expected cuda:0"):
            setup.forward(**{name: tensor})
    with pytest.raises(InvalidArgumentError, match="query lies on cuda:0"):
        setup.forward(kv=torch.zeros(4, 2, 2, 8, 16, dtype=torch.bfloat16))
    with pytest.raises(InvalidArgumentError, match="isa is 'portable'"):
        setup.forward(isa="portable")
    with pytest.raises(InvalidArgumentError, match="stream is 'x'"):
        setup.forward(stream="x")


def test_shapes_are_checked_as_on_the_cpu(setup: Setup) -> None:
    with pytest.raises(InvalidArgumentError, match="out: shape"):
        setup.forward(out=setup.arena.tensor(PAGE, (2, 2, 16), "bfloat16"))
    with pytest.raises(InvalidArgumentError, match="out is memory that overlaps query"):
        setup.forward(out=setup.arena.tensor(64, (2, 4, 16), "bfloat16"))
    with pytest.raises(InvalidArgumentError, match="window is -1"):
        setup.forward(window=-1)
    with pytest.raises(InvalidArgumentError, match="threads is 0"):
        setup.forward(threads=0)
    assert setup.pool.stats().capacity == 4


def test_tables_of_the_host_are_checked_with_residency(setup: Setup) -> None:
    setup.validate(int32([[1, 2, 9]] * 2), int32([16, 0]))
    with pytest.raises(NotResidentError, match="9"):
        setup.validate(int32([[1, 2, 9]] * 2), int32([17, 0]))
    with pytest.raises(InvalidArgumentError, match=r"block_tables\[0, 2\] is 64"):
        setup.validate(int32([[1, 2, 64]] * 2), int32([17, 0]))
    with pytest.raises(InvalidArgumentError, match=r"seq_lens\[1\] is 25"):
        setup.validate(int32([[1, 2, 3]] * 2), int32([17, 25]))


def test_a_stream_means_nothing_on_the_cpu() -> None:
    kv = torch.zeros(4, 2, 2, 8, 16)
    query = torch.zeros(1, 2, 16)
    with pytest.raises(InvalidArgumentError, match="stream is 7, expected None"):
        paged_attention(query, kv, int32([[1]]), int32([1]), scale=1.0, stream=7)
    with pytest.raises(TypeError, match="query is not on a GPU"):
        check_block_tables(query, kv, int32([[1]]), int32([1]))


def test_arrays_of_other_libraries_on_a_gpu_are_refused(setup: Setup) -> None:
    with pytest.raises(TypeError, match="expected a torch or a cupy array"):
        paged_attention(setup.query, setup.pool.layer(0), setup.tables, setup.lens, scale=1.0)


def test_streams_are_known_by_their_handles() -> None:
    class Torch:
        cuda_stream = 5

    class Cupy:
        ptr = 6

    class Other:
        def __cuda_stream__(self) -> tuple[int, int]:
            return (0, 8)

    assert [cuda_arrays.stream_handle(s) for s in (0, 7, Torch(), Cupy(), Other())] == [
        0,
        7,
        5,
        6,
        8,
    ]
    for bad in (True, -1, "x", 1.5, None):
        with pytest.raises(PipeliveError, match="expected a CUDA stream"):
            cuda_arrays.stream_handle(bad)


class PinnedArray:
    """Pinned memory of a stand-in for torch, which the GPU reads when it comes to it."""

    def __init__(self, values: list[int]) -> None:
        self.values = values

    def is_pinned(self) -> bool:
        return True

    def copy_(self, other: PinnedArray) -> PinnedArray:
        self.values[:] = other.values
        return self

    def to(self, device: str, *, non_blocking: bool) -> Callable[[], list[int]]:
        assert (device, non_blocking) == ("cuda:0", True)
        return lambda: list(self.values)


def test_pinned_tables_may_be_changed_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def empty_like(array: PinnedArray, *, pin_memory: bool) -> PinnedArray:
        assert pin_memory  # else the copy of the copy would be waited for
        return PinnedArray([-1] * len(array.values))

    stream = SimpleNamespace(cuda_stream=7)
    stand_in = SimpleNamespace(
        as_tensor=lambda array: array,
        empty_like=empty_like,
        cuda=SimpleNamespace(current_stream=lambda device: stream),
    )
    monkeypatch.setitem(sys.modules, "torch", stand_in)
    query = SimpleNamespace(is_cuda=True, device="cuda:0", new_empty=None)
    gpu = cuda_arrays.of(query)
    assert gpu is not None
    tables = PinnedArray([1, 2, 3])
    on_gpu = gpu.copy_of(tables)
    tables.values[:] = [9, 9, 9]
    assert on_gpu() == [1, 2, 3]


def test_what_lies_on_a_gpu_says_so() -> None:
    class OnGpu:
        def __dlpack_device__(self) -> tuple[int, int]:
            return (2, 1)

    assert cuda_arrays.on_gpu(OnGpu())
    assert not cuda_arrays.on_gpu(torch.zeros(1))
    assert not cuda_arrays.on_gpu(torch.zeros(1).numpy())
    assert not cuda_arrays.on_gpu([1, 2])
    assert not cuda_arrays.on_gpu(None)
    assert cuda_arrays.queue_of(None, OnGpu()).stream is None
    assert all("libnvrtc.so" in path for path in cuda_arrays.nvrtc_libraries())

"""Append on a GPU, and the marks that it makes."""

from __future__ import annotations

import contextlib
import gc
import sys
import types
import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from gpu_memory import FakeGpu, Gpu

from pipelive_kv.attention import append, check_block_tables, paged_attention
from pipelive_kv.errors import BusyError, DeadlineError, InvalidArgumentError
from pipelive_kv.kv import KVPool
from pipelive_kv.spec import KVSpec
from pipelive_kv.tracker import DirtyTracker

BLOCKS = 40
ORDERS = ("hnd", "nhd")


def tokens(seed: int, count: int, spec: KVSpec, dtype: str) -> np.ndarray[Any, Any]:
    random = np.random.default_rng(seed)
    shape = (count, spec.num_kv_heads, spec.head_dim)
    if dtype == "float32":
        return random.standard_normal(shape, dtype=np.float32)
    return random.integers(0, 1 << 14, shape, dtype=np.uint16)


def torch_view(array: np.ndarray[Any, Any], dtype: str) -> Any:
    torch = pytest.importorskip("torch")
    return torch.from_numpy(array).view(getattr(torch, dtype))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("source", ["same", "float32"])
@pytest.mark.parametrize("head_dim", [64, 80])
def test_writes_what_the_cpu_writes(
    gpu: Gpu, order: str, dtype: str, source: str, head_dim: int
) -> None:
    spec = KVSpec(3, head_dim, dtype, 8, order)
    kind = dtype if source == "same" else source
    slots = np.random.default_rng(1).permutation(BLOCKS * 8)[:150].astype(np.int64)
    slots[::7] = -1
    key, value = tokens(2, 150, spec, kind), tokens(3, 150, spec, kind)
    options = {"num_layers": 2, "layers": (1,), "max_blocks": BLOCKS, "capacity": BLOCKS}
    with gpu.pool(spec, **options) as pool, KVPool(spec, **options) as cpu:
        gpu.write(pool.layer(1).data_ptr, bytes(BLOCKS * spec.block_bytes))
        cpu.layer(1).as_uint16()[...] = 0
        append(
            pool.layer(1),
            gpu.put(key, kind),
            gpu.put(value, kind),
            gpu.put(slots, "int64"),
            stream=gpu.stream,
        )
        append(cpu.layer(1), torch_view(key, kind), torch_view(value, kind), slots)
        assert (gpu.layer(pool, 1) == cpu.layer(1).as_uint16()[:BLOCKS]).all()


def test_marks_are_collected_step_by_step(gpu: Gpu) -> None:
    spec = KVSpec(2, 64, "bfloat16", 16)
    with gpu.pool(spec, num_layers=2, layers=(0, 1), max_blocks=64, capacity=64) as pool:
        tracker = DirtyTracker(64 * 16, device=gpu.device, marked_steps=3)
        host = DirtyTracker(64 * 16)
        random = np.random.default_rng(5)
        for seq in range(25):
            slots = random.integers(-1, 64 * 16, 30, dtype=np.int64)
            slots = np.unique(slots)
            key = gpu.put(tokens(seq, len(slots), spec, "bfloat16"), "bfloat16")
            on_gpu = gpu.put(slots, "int64")
            tracker.open(seq)
            host.open(seq)
            tracker.mark(seq, gpu.named_stream)
            append(pool.layer(0), key, key, on_gpu, stream=gpu.stream, marks=tracker)
            append(pool.layer(1), key, key, on_gpu, stream=gpu.stream)
            host.record(seq, slots)
            if gpu.stream is None:
                tracker.seal(seq)
            else:
                tracker.seal(seq, stream=gpu.stream)
            host.seal(seq)
            if seq % 6 == 5:
                tracker.wait_sealed(seq, 30.0)
                assert tracker.pending_slots == host.pending_slots
                found, wanted = tracker.collect(), host.collect()
                assert (found.ranges == wanted.ranges).all()
                assert (found.through_seq, found.num_slots) == (seq, wanted.num_slots)
        assert tracker.marks.skipped_slots() == 0


@pytest.mark.small
def test_slots_out_of_range_are_skipped_and_counted(gpu: Gpu) -> None:
    spec = KVSpec(1, 64, "bfloat16", 16)
    with gpu.pool(spec, num_layers=1, layers=(0,), max_blocks=4, capacity=4) as pool:
        gpu.fill(pool, 0, 1)
        before = gpu.layer(pool, 0)
        tracker = DirtyTracker(64, device=gpu.device)
        tracker.open(0)
        tracker.mark(0, gpu.named_stream)
        slots = np.array([-1, 64, -5, 1 << 50], dtype=np.int64)
        key = gpu.put(tokens(1, 4, spec, "bfloat16"), "bfloat16")
        append(pool.layer(0), key, key, gpu.put(slots, "int64"), stream=gpu.stream, marks=tracker)
        tracker.seal(0, stream=gpu.named_stream)
        tracker.wait_sealed(0, 30.0)
        assert tracker.collect().num_slots == 0
        assert tracker.marks.skipped_slots() == 3
        assert (gpu.layer(pool, 0) == before).all()


def test_wrong_arguments_are_named(gpu: Gpu) -> None:
    spec = KVSpec(2, 64, "bfloat16", 16)
    with gpu.pool(spec, num_layers=1, layers=(0,), max_blocks=4, capacity=4) as pool:
        layer = pool.layer(0)
        rows = tokens(1, 2, spec, "bfloat16")
        key, slots = gpu.put(rows, "bfloat16"), gpu.put(np.array([1, 2], dtype=np.int64), "int64")
        with pytest.raises(InvalidArgumentError, match="key is on cpu, expected cuda:0"):
            append(layer, torch_view(rows, "bfloat16"), key, slots)
        with pytest.raises(InvalidArgumentError, match="slots has dtype"):
            append(layer, key, key, gpu.put(np.array([1, 2], dtype=np.int32), "int32"))
        with pytest.raises(InvalidArgumentError, match="number of heads"):
            append(layer, gpu.put(rows[:, :1], "bfloat16"), key, slots)
        with pytest.raises(InvalidArgumentError, match="stream"):
            append(layer, key, key, slots, stream="0")
        small = DirtyTracker(10, device=gpu.device)
        with pytest.raises(InvalidArgumentError, match="marks"):
            append(layer, key, key, slots, marks=small)
        with pytest.raises(InvalidArgumentError, match="without a device"):
            append(layer, key, key, slots, marks=DirtyTracker(64))


def test_a_tracker_with_a_device(gpu: Gpu) -> None:
    tracker = DirtyTracker(100, device=gpu.device, marked_steps=2)
    for seq in range(3):
        tracker.open(seq)
    tracker.mark(0, gpu.named_stream)
    tracker.mark(1, gpu.named_stream)
    with pytest.raises(BusyError, match="2 steps are in flight"):
        tracker.mark(2, gpu.named_stream)
    with pytest.raises(DeadlineError, match="step 0"):
        tracker.wait_sealed(0, 0.01)
    tracker.record(0, [3, 4])
    tracker.seal(0, stream=1)
    tracker.wait_sealed(0, 30.0)
    tracker.mark(2, gpu.named_stream)
    assert tracker.collect().ranges.tolist() == [[3, 2]]
    with pytest.raises(InvalidArgumentError, match="is marked already"):
        tracker.mark(2, gpu.named_stream)


def test_a_step_is_marked_in_a_stream_that_is_named(gpu: Gpu) -> None:
    tracker = DirtyTracker(100, device=gpu.device)
    tracker.open(0)
    with pytest.raises(TypeError, match="stream"):
        tracker.mark(0)  # type: ignore[call-arg]
    with pytest.raises(
        TypeError, match="stream is None, expected the stream of the step's appends"
    ):
        tracker.mark(0, None)
    tracker.mark(0, gpu.named_stream)  # neither of them took the step's set


def test_a_tracker_without_a_device() -> None:
    tracker = DirtyTracker(100)
    tracker.open(0)
    with pytest.raises(InvalidArgumentError, match="without marks"):
        tracker.mark(0, 1)
    with pytest.raises(InvalidArgumentError, match="without a device"):
        tracker.seal(0, stream=1)
    with pytest.raises(InvalidArgumentError, match="expected a GPU"):
        DirtyTracker(100, device="cpu")
    with pytest.raises(DeadlineError):
        tracker.wait_sealed(0, 0.01)


@pytest.mark.parametrize("gpu", ["fake"], indirect=True)
def test_kernels_that_the_build_has_none_of_are_compiled_once(gpu: Gpu) -> None:
    assert isinstance(gpu, FakeGpu)
    gpu.cuda.library.fake_driver_version(1000)  # every compiler's fatbins are too new for it
    spec = KVSpec(2, 64, "bfloat16", 8)
    key = tokens(1, 4, spec, "bfloat16")
    with gpu.pool(spec, num_layers=1, layers=(0,), max_blocks=8, capacity=8) as pool:
        for first in (0, 4):
            slots = np.arange(first, first + 4, dtype=np.int64)
            where = gpu.put(key, "bfloat16"), gpu.put(key, "bfloat16"), gpu.put(slots, "int64")
            append(pool.layer(0), *where, stream=gpu.stream)
        assert gpu.nvrtc.compiled == [
            "copy_many.cu",
            "slots_copy.cu",
            "slots_append.cu",
            "slots_marks.cu",
        ]
        written = gpu.layer(pool, 0)[0, :, 0]  # [head, token, dim] of the first block's keys
        assert (written == np.concatenate([key, key]).transpose(1, 0, 2)).all()


@pytest.mark.parametrize("gpu", ["fake"], indirect=True)
def test_a_stream_object_is_kept_until_it_is_released(gpu: Gpu) -> None:
    """A stream that is destroyed sooner could not be waited for by the next shrink."""

    class Stream:
        cuda_stream = 1

    spec = KVSpec(2, 64, "bfloat16", 8)
    key = gpu.put(tokens(1, 4, spec, "bfloat16"), "bfloat16")
    slots = gpu.put(np.arange(4, dtype=np.int64), "int64")
    with gpu.pool(spec, num_layers=1, layers=(0,), max_blocks=8, capacity=8) as pool:
        kept = []
        for _ in range(2):
            stream = Stream()
            kept.append(weakref.ref(stream))
            for _ in range(2):
                append(pool.layer(0), key, key, slots, stream=stream)
            before = sys.getrefcount(stream)
            append(pool.layer(0), key, key, slots, stream=stream)
            assert sys.getrefcount(stream) == before
            del stream
        gc.collect()
        assert kept[0]() is None  # the same stream, named by a later object
        assert kept[1]() is not None
        pool.shrink(1)
        assert kept[1]() is not None
        pool.release_stream(1)
        assert kept[1]() is None
        stream = Stream()
        kept.append(weakref.ref(stream))
        append(pool.layer(0), key, key, slots, stream=stream)
        del stream
    del pool
    gc.collect()
    assert kept[2]() is None


@pytest.mark.parametrize("gpu", ["fake"], indirect=True)
def test_torch_is_asked_for_an_order_only_where_there_is_none(
    gpu: Gpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch = pytest.importorskip("torch")
    entered: list[Any] = []

    class Tensor:
        """Memory of the stand-in as torch would lend it."""

        is_cuda = True
        device = "cuda:0"
        new_empty = None

        def __init__(self, lender: Any) -> None:
            self.lender = lender
            self.asked: list[int] = []

        def __dlpack_device__(self) -> tuple[int, int]:
            return (2, 0)

        def __dlpack__(self, *, stream: int, **options: Any) -> Any:
            assert entered == [self.device]
            self.asked.append(stream)
            return self.lender.__dlpack__(stream=stream, **options)

    @contextlib.contextmanager
    def device(where: Any) -> Iterator[None]:
        entered.append(where)
        yield
        entered.remove(where)

    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(
        torch.cuda, "current_stream", lambda where: types.SimpleNamespace(cuda_stream=1)
    )
    assert isinstance(gpu, FakeGpu)
    other = gpu.cuda.new_stream()
    spec = KVSpec(2, 64, "bfloat16", 8)
    key = Tensor(gpu.put(tokens(1, 4, spec, "bfloat16"), "bfloat16"))
    slots = Tensor(gpu.put(np.arange(4, dtype=np.int64), "int64"))
    with gpu.pool(spec, num_layers=1, layers=(0,), max_blocks=8, capacity=8) as pool:
        append(pool.layer(0), key, key, slots)
        append(pool.layer(0), key, key, slots, stream=other)
        append(pool.layer(0), key, key, slots.lender)
    assert key.asked == [-1, -1, other, other, 1, 1]
    assert slots.asked == [-1, other]


@pytest.mark.gpu
def test_tensors_of_another_gpu_than_torchs_current_one() -> None:
    torch = pytest.importorskip("torch")
    if torch.cuda.device_count() < 2:
        pytest.skip(f"needs 2 GPUs, {torch.cuda.device_count()} here")
    spec = KVSpec(2, 64, "bfloat16", 16)
    with KVPool(
        spec,
        num_layers=1,
        layers=(0,),
        max_blocks=8,
        capacity=8,
        budget=64 << 20,
        device="cuda:1",
    ) as pool:
        assert torch.cuda.current_device() == 0
        key = torch.randn(4, 2, 64, device="cuda:1").bfloat16()
        slots = torch.arange(4, device="cuda:1")
        append(pool.layer(0), key, key, slots)
        tables = torch.zeros(1, 1, dtype=torch.int32, device="cuda:1")
        lens = torch.full((1,), 4, dtype=torch.int32, device="cuda:1")
        out = paged_attention(key[:1], pool.layer(0), tables, lens, scale=0.125)
        check_block_tables(key[:1], pool.layer(0), tables, lens)
        torch.cuda.synchronize(1)
        assert out.device == key.device
        assert torch.cuda.current_device() == 0


@pytest.mark.gpu
@pytest.mark.small
def test_a_captured_append_marks_for_the_step_that_replays_it() -> None:
    torch = pytest.importorskip("torch")
    spec = KVSpec(2, 64, "bfloat16", 16)
    with KVPool(
        spec, num_layers=1, layers=(0,), max_blocks=64, capacity=64, budget=64 << 20, device="cuda"
    ) as pool:
        tracker = DirtyTracker(64 * 16, device=pool.page_pool.device)
        slots = torch.zeros(4, dtype=torch.int64, device="cuda")
        key = torch.randn(4, 2, 64, device="cuda").bfloat16()
        append(pool.layer(0), key, key, slots)  # loads the kernels
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            stream = torch.cuda.current_stream()
            append(pool.layer(0), key, key, slots, stream=stream, marks=tracker)
        for seq in range(6):
            stream = torch.cuda.current_stream()
            slots.copy_(torch.arange(seq * 8, seq * 8 + 4))
            tracker.open(seq)
            tracker.mark(seq, stream)
            graph.replay()
            tracker.seal(seq, stream=stream)
            tracker.wait_sealed(seq, 30.0)
            assert tracker.collect().ranges.tolist() == [[seq * 8, 4]]

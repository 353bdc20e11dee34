"""CUDA devices as Python sees them, on the fake driver."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from tests.cuda_fake import POISON, FakeCuda

from pipelive_kv import _core
from pipelive_kv.attention import append
from pipelive_kv.errors import BusyError, DeviceError, InvalidArgumentError, OutOfMemoryError
from pipelive_kv.kv import KVPool
from pipelive_kv.memory import Arena, PagePool, open_device
from pipelive_kv.spec import KVSpec

PAGE = 4096
SPEC = KVSpec(2, 8, "bfloat16", 4)


@pytest.fixture
def cuda() -> Iterator[FakeCuda]:
    fake = FakeCuda(page_bytes=PAGE, devices=2)
    yield fake
    gc.collect()
    assert fake.mistakes == ""
    assert fake.held == 0


class Borrowed:
    """Something of another library on a GPU, which notes how it was asked."""

    def __init__(self, view: object) -> None:
        self.view = view
        self.streams: list[object] = []

    def __dlpack__(self, *, stream: object = None, **keywords: object) -> object:
        self.streams.append(stream)
        return self.view.__dlpack__(stream=stream, **keywords)  # type: ignore[attr-defined]

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.view.__dlpack_device__()  # type: ignore[attr-defined, no-any-return]


def test_names_of_devices() -> None:
    for name in ("gpu", "cuda:", "cuda:x", "cuda:-1", "cuda0", 3):
        with pytest.raises(InvalidArgumentError, match="expected 'cpu', 'cuda' or 'cuda:1'"):
            open_device(name)  # type: ignore[arg-type]
    with pytest.raises(DeviceError, match=r"libnot_there\.so\.7"):
        _core.CudaDevice(0, "libnot_there.so.7")


def test_says_what_it_is(cuda: FakeCuda) -> None:
    device = cuda.device(1)
    assert (device.name, device.page_granularity) == ("cuda:1", PAGE)
    assert device.exportable
    assert device.rdma
    free, total = device.memory()
    assert free == total == 4 << 30
    with pytest.raises(InvalidArgumentError, match="device is 2"):
        cuda.device(2)


def test_arena_tensors_are_on_the_gpu(cuda: FakeCuda) -> None:
    pool = PagePool(8 * PAGE, page_bytes=PAGE, device=cuda.device(1))
    with Arena(pool, 4 * PAGE, scrub=True) as arena:
        arena.map(0, 2 * PAGE)
        tensor = arena.tensor(PAGE, [4, 8], "float32")
        assert tensor.device == "cuda:1"
        assert tensor.__dlpack_device__() == (2, 1)
        assert cuda.read(tensor.data_ptr, 128) == bytes(128)
        for view in (tensor.numpy, tensor.as_uint16):
            with pytest.raises(InvalidArgumentError, match=r"CPU, and this is on cuda:1"):
                view()
        tensor.__dlpack__(stream=1)
        tensor.__dlpack__(stream=-1, max_version=(1, 0))
        with pytest.raises(ValueError, match="stream is 0"):
            tensor.__dlpack__(stream=0)
        with pytest.raises(BufferError):
            tensor.__dlpack__(dl_device=(1, 0))
        with Arena(pool, PAGE) as dirty:
            dirty.map(0, PAGE)
            assert set(cuda.read(dirty.data_ptr, PAGE)) == {POISON}
    pool.close()


def test_kv_views_are_on_the_gpu(cuda: FakeCuda) -> None:
    with KVPool(
        SPEC,
        num_layers=2,
        layers=[0, 1],
        max_blocks=40,
        capacity=4,
        device=cuda.device(),
        page_bytes=PAGE,
    ) as pool:
        view = pool.layer(1)
        assert view.device == "cuda:0"
        assert view.__dlpack_device__() == view.key.__dlpack_device__() == (2, 0)
        for array in (view.numpy, view.as_uint16):
            with pytest.raises(InvalidArgumentError, match="cuda:0"):
                array()
        assert cuda.read(view.data_ptr, SPEC.block_bytes) == bytes(SPEC.block_bytes)
        pool.grow(40)
        pool.move_blocks({1: 30})
        pool.shrink(3, live=[30], moves={30: 2})
        assert cuda.count("cuCtxSynchronize") == 0


def test_pages_pass_between_kv_and_weights_without_the_driver(cuda: FakeCuda) -> None:
    pages = PagePool(16 * PAGE, page_bytes=PAGE, device=cuda.device())
    kv = KVPool(SPEC, num_layers=1, layers=[0], max_blocks=48, capacity=48, page_pool=pages)
    weights = Arena(pages, 16 * PAGE)
    made = pages.stats().pages_created
    calls = cuda.count("cuMemCreate"), cuda.count("cuMemRelease")
    kv.shrink(8)
    weights.map(0, 2 * PAGE)
    weights.unmap(0, 2 * PAGE)
    kv.grow(48)
    assert pages.stats().pages_created == made
    assert (cuda.count("cuMemCreate"), cuda.count("cuMemRelease")) == calls
    weights.close()
    kv.close()
    pages.close()


def test_streams_are_announced_and_ordered(cuda: FakeCuda) -> None:
    class TorchStream:
        cuda_stream = 0

    class CupyStream:
        ptr = 1

    class AnyStream:
        def __cuda_stream__(self) -> tuple[int, int]:
            return (0, 1)

    with KVPool(
        SPEC,
        num_layers=1,
        layers=[0],
        max_blocks=48,
        capacity=48,
        device=cuda.device(),
        page_bytes=PAGE,
    ) as pool:
        view = pool.layer(0)
        with pytest.raises(
            InvalidArgumentError, match="stream is 2, .*another one in every thread"
        ):
            pool.use_stream(2)
        recorded = cuda.count("cuEventRecord")
        view.__dlpack__(stream=2)
        assert cuda.count("cuEventRecord") == recorded
        for stream in (TorchStream(), CupyStream(), AnyStream(), 1):
            pool.use_stream(stream)
        with pytest.raises(InvalidArgumentError, match="expected a CUDA stream"):
            pool.use_stream("compute")
        # The consumer's stream waits for the announced one, unless it is the same or asks not to.
        view.__dlpack__(stream=1)
        view.__dlpack__(stream=-1)
        view.__dlpack__()
        assert cuda.count("cuEventRecord") == recorded
        view.__dlpack__(stream=2)
        assert cuda.count("cuEventRecord") == recorded + 1
        assert cuda.count("cuStreamWaitEvent") >= 1
        pool.shrink(5, live=[40], moves={40: 3}, stream=1)
        pool.release_stream(1)


def test_a_capture_refuses_a_shrink(cuda: FakeCuda) -> None:
    with KVPool(
        SPEC,
        num_layers=1,
        layers=[0],
        max_blocks=48,
        capacity=48,
        device=cuda.device(),
        page_bytes=PAGE,
    ) as pool:
        cuda.library.fake_driver_capture(ctypes.c_void_p(1), 1)
        with pytest.raises(BusyError, match="captured into a CUDA graph"):
            pool.shrink(5)
        assert pool.capacity == 48
        cuda.library.fake_driver_capture(ctypes.c_void_p(1), 0)
        pool.shrink(5)


def test_a_capture_refuses_what_comes_from_outside(cuda: FakeCuda) -> None:
    with KVPool(
        SPEC,
        num_layers=1,
        layers=[0],
        max_blocks=48,
        capacity=48,
        device=cuda.device(),
        page_bytes=PAGE,
    ) as pool:
        view = pool.layer(0)
        pool.use_stream(1)
        own = 2  # of this thread
        cuda.library.fake_driver_capture(ctypes.c_void_p(own), 1)
        with pytest.raises(BusyError, match="captured into a CUDA graph"):
            view.__dlpack__(stream=own)
        cuda.library.fake_driver_capture(ctypes.c_void_p(own), 0)
        view.__dlpack__(stream=own)
        pool.release_stream(1)


def test_memory_of_a_gpu_is_adopted(cuda: FakeCuda) -> None:
    with KVPool(
        SPEC,
        num_layers=2,
        layers=[0, 1],
        max_blocks=6,
        capacity=6,
        device=cuda.device(1),
        page_bytes=PAGE,
    ) as engine:
        theirs = {layer: Borrowed(engine.layer(layer)) for layer in (0, 1)}
        adopted = KVPool.adopt(SPEC, theirs)
        view = adopted.layer(1)
        assert view.device == "cuda:1"
        assert view.__dlpack_device__() == (2, 1)
        assert view.data_ptr == engine.layer(1).data_ptr
        assert view.strides == engine.layer(1).strides
        # Nothing is ordered when memory is adopted: that is done when it is used.
        assert theirs[0].streams == [-1]
        with pytest.raises(InvalidArgumentError, match="cuda:1"):
            view.as_uint16()
        with pytest.raises(InvalidArgumentError, match="another device"):
            KVPool.adopt(SPEC, {0: theirs[0], 1: torch.zeros(6, 2, 2, 4, 8, dtype=torch.bfloat16)})
        adopted.close()


def test_torch_lends_what_is_adopted_while_its_device_is_current(
    cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    current = [0]

    class Tensor(Borrowed):
        """As a tensor of torch on a GPU."""

        is_cuda = True
        new_empty = None
        device = torch.device("cuda", 1)

        def __dlpack__(self, *, stream: object = None, **keywords: object) -> object:
            if current[-1] != self.device.index:
                raise BufferError("Can't export tensors on a different CUDA device index.")
            return super().__dlpack__(stream=stream, **keywords)

    @contextlib.contextmanager
    def device(where: torch.device) -> Iterator[None]:
        current.append(where.index)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "device", device)
    with KVPool(
        SPEC,
        num_layers=2,
        layers=[0, 1],
        max_blocks=6,
        capacity=6,
        device=cuda.device(1),
        page_bytes=PAGE,
    ) as engine:
        adopted = KVPool.adopt(SPEC, {layer: Tensor(engine.layer(layer)) for layer in (0, 1)})
        assert adopted.layer(1).device == "cuda:1"
        assert current == [0]
        adopted.close()


def test_managed_memory_is_refused_by_name(cuda: FakeCuda) -> None:
    get_pointer = ctypes.pythonapi.PyCapsule_GetPointer
    get_pointer.restype, get_pointer.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)

    class Managed(Borrowed):
        """As an array of cupy's managed allocator."""

        def __dlpack__(self, *, stream: object = None, **keywords: object) -> object:
            capsule = super().__dlpack__(stream=stream, **keywords)
            place = get_pointer(capsule, b"dltensor_versioned") + 40  # of the device's type
            ctypes.c_int32.from_address(place).value = 13
            return capsule

        def __dlpack_device__(self) -> tuple[int, int]:
            return (13, 0)

    with KVPool(
        SPEC,
        num_layers=1,
        layers=[0],
        max_blocks=6,
        capacity=6,
        device=cuda.device(),
        page_bytes=PAGE,
    ) as pool:
        managed = Managed(pool.layer(0))
        with pytest.raises(InvalidArgumentError, match=r"tensors\[0\] lies in managed memory"):
            KVPool.adopt(SPEC, {0: managed})
        with pytest.raises(InvalidArgumentError, match="managed memory"):
            append(managed, managed, managed, managed)


def test_no_memory_left(cuda: FakeCuda) -> None:

    device = cuda.device()
    pool = PagePool(8 * PAGE, page_bytes=PAGE, device=device)
    arena = Arena(pool, 8 * PAGE)
    cuda.fail("cuMemCreate", 2)
    with pytest.raises(OutOfMemoryError, match="cuda:0"):
        arena.map(0, PAGE)
    arena.close()
    pool.close()


def test_pages_of_a_gpu_are_no_buffer(cuda: FakeCuda) -> None:
    device = cuda.device()
    pool = PagePool(8 * PAGE, page_bytes=PAGE, device=device)
    with Arena(pool, PAGE) as arena:
        arena.map(0, PAGE)
        fd, offset, nbytes = arena.export_page(0)
        try:
            imported = device.import_pages(fd, offset, nbytes)
        finally:
            os.close(fd)
        assert imported.nbytes == PAGE
        assert set(cuda.read(imported.data_ptr, PAGE)) == {POISON}
        with pytest.raises(BufferError):
            memoryview(imported)
        del imported
    pool.close()


def test_numpy_and_torch_of_the_host_are_borrowed_as_ever() -> None:
    spec = KVSpec(2, 8, "float32", 4)
    array = np.zeros((3, 2, 2, 4, 8), np.float32)
    assert KVPool.adopt(spec, {0: array}).layer(0).device == "cpu"
    assert KVPool.adopt(spec, {0: torch.from_numpy(array)}).layer(0).device == "cpu"

"""Pools on a real GPU: memory that comes and goes behind tensors of torch and cupy."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading

import pytest

from pipelive_kv.errors import BusyError, InvalidArgumentError, NotResidentError, OverBudgetError
from pipelive_kv.kv import KVPool
from pipelive_kv.memory import Arena, open_device

torch = pytest.importorskip("torch")
if torch.cuda.is_available():
    from tests.gpu.tools import (
        MIB,
        PAGE,
        SPEC,
        as_torch,
        captured,
        free_bytes,
        make_pool,
        pages_of,
        spin,
    )

pytestmark = pytest.mark.gpu


@pytest.mark.small
def test_views_are_torch_tensors_in_place() -> None:
    with make_pool() as pool:
        view = pool.layer(1)
        tensor = as_torch(view)
        # Not the tensor itself in an assert: to show it, pytest would read where nothing is mapped.
        device, dtype, address = tensor.device, tensor.dtype, tensor.data_ptr()
        shape, strides = tuple(tensor.shape), tensor.stride()
        assert (device, dtype) == (torch.device("cuda", 0), torch.bfloat16)
        assert (address, shape, strides) == (view.data_ptr, view.shape, view.strides)
        assert torch.count_nonzero(tensor[:64]) == 0
        tensor[:64] = 3
        assert torch.equal(as_torch(view.value)[:64], tensor[:64, :, 1])
        with pytest.raises(InvalidArgumentError, match="cuda:0"):
            view.as_uint16()
        with pytest.raises(NotResidentError):
            view.check_resident([64])


def test_views_are_cupy_arrays_in_place() -> None:
    cupy = pytest.importorskip("cupy")
    spec = type(SPEC)(8, 128, "float16", 32)
    pool = KVPool(spec, num_layers=1, layers=[0], max_blocks=64, capacity=64, device="cuda:0")
    array = cupy.from_dlpack(pool.layer(0))
    assert array.data.ptr == pool.layer(0).data_ptr
    array[5] = 2
    cupy.cuda.Device(0).synchronize()
    assert (as_torch(pool.layer(0))[5] == 2).all()
    stream = cupy.cuda.Stream(non_blocking=True)
    pool.use_stream(stream)
    with stream:
        array[6] = 4
    pool.shrink(16)
    pool.release_stream(stream)
    assert (as_torch(pool.layer(0))[6] == 4).all()
    del array
    pool.close()


@pytest.mark.small
@pytest.mark.parametrize("stack", [1, 2])
def test_grow_and_shrink_keep_addresses_and_bytes(stack: int) -> None:
    with make_pool(stack=stack, layers=[0, 1]) as pool:
        tensors = [as_torch(pool.layer(layer)) for layer in (0, 1)]
        addresses = [tensor.data_ptr() for tensor in tensors]
        for layer, tensor in enumerate(tensors):
            for block in range(64):
                tensor[block] = layer * 100 + block % 50
        pool.grow(1000)
        for layer, tensor in enumerate(tensors):
            for block in (0, 17, 63):
                assert (tensor[block] == layer * 100 + block % 50).all()
            assert torch.count_nonzero(tensor[64:1000]) == 0
            tensor[64:1000] = 7
        pool.shrink(32, live=[3, 60, 900], moves={60: 10, 900: 11})
        for layer, tensor in enumerate(tensors):
            assert (tensor[3] == layer * 100 + 3).all()
            assert (tensor[10] == layer * 100 + 60 % 50).all()
            assert (tensor[11] == 7).all()
        pool.grow(64)
        for tensor in tensors:
            assert torch.count_nonzero(tensor[32:64]) == 0
        assert addresses == [pool.layer(layer).data_ptr for layer in (0, 1)]


def test_memory_comes_back_to_the_device() -> None:
    torch.zeros(1, device="cuda")
    before = free_bytes()
    pages = pages_of(600 * MIB)
    pool = make_pool(page_pool=pages, capacity=1024)  # 2 layers of 128 MiB
    held = before - free_bytes()
    assert 256 * MIB <= held <= 256 * MIB + 32 * MIB
    pool.shrink(64)
    assert pages.trim() == 2 * 120 * MIB
    assert before - free_bytes() <= held - 240 * MIB + 8 * MIB
    pool.close()
    pages.close()
    del pool, pages
    gc.collect()
    assert before - free_bytes() <= 32 * MIB  # what the driver keeps for itself


def test_torch_gets_what_a_pool_gives_back() -> None:
    free = free_bytes()
    if free < 8 << 30:
        pytest.skip(f"needs 8 GiB of free device memory, {free / (1 << 30):.1f} are")
    # All but 8 GiB is taken in one piece: the pages of a whole card would take minutes.
    ballast = torch.empty(free - (8 << 30), dtype=torch.uint8, device="cuda")
    most = (free_bytes() - (2 << 30)) // PAGE * PAGE
    pages = pages_of(most)
    arena = Arena(pages, most)
    arena.map(0, most)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        torch.empty(4 << 30, dtype=torch.uint8, device="cuda")
    arena.close()
    pages.trim()
    tensor = torch.ones(4 << 30, dtype=torch.uint8, device="cuda")
    # And the other way round: pages beside torch's caching allocator.
    arena = Arena(pages, 1 << 30)
    arena.map(0, 1 << 30)
    as_torch(arena.tensor(0, [1 << 30], "uint8")).zero_()
    assert bool((tensor[:: 1 << 20] == 1).all())
    arena.close()
    pages.close()
    del tensor, ballast
    torch.cuda.empty_cache()


def test_pages_pass_between_kv_and_weights_without_the_driver() -> None:
    pages = pages_of(256 * MIB)
    pool = make_pool(page_pool=pages, capacity=512)
    weights = Arena(pages, 256 * MIB)
    created = pages.stats().pages_created
    pool.shrink(64)
    weights.map(0, 112 * MIB)
    tensor = as_torch(weights.tensor(0, [112 * MIB], "uint8"))
    tensor.fill_(0xFF)
    torch.cuda.synchronize()
    del tensor
    weights.unmap(0, 112 * MIB)
    pool.grow(512)
    # 0xFFFF is a NaN of bfloat16; none of it may show up in KV memory.
    assert torch.count_nonzero(as_torch(pool.layer(0))[64:512]) == 0
    assert pages.stats().pages_created == created
    with pytest.raises(OverBudgetError):
        weights.map(0, 200 * MIB)
    weights.close()
    pool.close()
    pages.close()


def test_pages_are_prepared_in_the_background() -> None:
    pages = pages_of(64 * MIB)
    pages.prepare(8, timeout=30)
    assert pages.stats().prepared_bytes == 8 * PAGE
    arena = Arena(pages, 16 * MIB)
    arena.map(0, 16 * MIB)
    assert torch.count_nonzero(as_torch(arena.tensor(0, [16 * MIB], "uint8"))) == 0
    arena.close()
    pages.close()


def test_a_graph_survives_grow_and_shrink() -> None:
    with make_pool() as pool:
        view = as_torch(pool.layer(0))
        step = torch.zeros(1, device="cuda", dtype=torch.bfloat16)
        block = torch.tensor([5], device="cuda")

        def work() -> None:
            step.add_(1)
            view.index_add_(0, block, step.expand(1, *view.shape[1:]).contiguous())

        graph = captured(work)
        view[5] = 0
        step.zero_()
        graph.replay()
        pool.grow(1000)
        graph.replay()
        block.fill_(900)
        graph.replay()
        torch.cuda.synchronize()
        assert (view[900] == 3).all()
        assert (view[5] == 3).all()
        pool.shrink(8, live=[5])
        block.fill_(5)
        graph.replay()
        torch.cuda.synchronize()
        assert (view[5] == 7).all()


def test_a_pool_may_be_resized_while_another_stream_captures() -> None:
    """The capture is in the mode that forbids other threads most, which is torch's default."""
    with make_pool() as pool:
        target = torch.zeros(1024, device="cuda")
        graph = torch.cuda.CUDAGraph()
        failures: list[BaseException] = []

        def resize() -> None:
            try:
                pool.grow(512)
                pool.shrink(64)
            except BaseException as error:
                failures.append(error)

        side = torch.cuda.Stream()
        with torch.cuda.graph(graph, stream=side):
            target.add_(1)
            thread = threading.Thread(target=resize)
            thread.start()
            thread.join(60)
            target.add_(1)
        assert not thread.is_alive()
        # The driver may refuse to record an event in the default stream meanwhile; it must say so.
        assert all(isinstance(error, BusyError) for error in failures), failures
        graph.replay()
        torch.cuda.synchronize()
        assert (target == 2).all()


def test_a_stream_under_capture_refuses_a_shrink() -> None:
    with make_pool() as pool:
        side = torch.cuda.Stream()
        pool.use_stream(side)
        target = torch.zeros(16, device="cuda")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=side):
            target.add_(1)
            with pytest.raises(BusyError, match="captured into a CUDA graph"):
                pool.shrink(8)
        assert pool.capacity == 64
        pool.shrink(8)


def test_a_shrink_waits_for_kernels_under_way() -> None:
    with make_pool(capacity=512) as pool:
        compute = torch.cuda.Stream()
        pool.use_stream(compute)
        view = as_torch(pool.layer(1))
        with torch.cuda.stream(compute):
            spin(300)
            view[500] = 1  # runs long after the shrink was asked for
            done = torch.cuda.Event()
            done.record()
        assert not done.query()
        pool.shrink(64)
        assert done.query()
        torch.cuda.synchronize()  # raises if the kernel met unmapped memory


def test_others_are_not_held_up_by_a_shrink() -> None:
    with make_pool(capacity=512) as pool:
        compute, unrelated = torch.cuda.Stream(), torch.cuda.Stream()
        pool.use_stream(compute)
        with torch.cuda.stream(unrelated):
            spin(1000)
            late = torch.cuda.Event()
            late.record()
        pool.shrink(64)
        pool.grow(512)
        assert not late.query(), "the resize waited for a stream that does not use the pool"
        torch.cuda.synchronize()


def test_moves_are_part_of_the_streams_work() -> None:
    with make_pool(capacity=512) as pool:
        compute = torch.cuda.Stream()
        pool.use_stream(compute)
        view = as_torch(pool.layer(0))
        with torch.cuda.stream(compute):
            spin(100)
            view[400] = 9
            pool.move_blocks({400: 3}, stream=compute)
            result = view[3].clone()
        compute.synchronize()
        assert (result == 9).all()


def test_exporting_orders_the_consumer_behind_the_announced_streams() -> None:
    with make_pool() as pool:
        compute = torch.cuda.Stream()
        pool.use_stream(compute)
        view = as_torch(pool.layer(0))
        consumer = torch.cuda.Stream()
        with torch.cuda.stream(compute):
            spin(200)
            view[7] = 5
        with torch.cuda.stream(consumer):
            result = as_torch(pool.layer(0))[7].clone()
        consumer.synchronize()
        assert (result == 5).all()


def test_scratch_stands_behind_holes() -> None:
    with make_pool(holes="scratch") as pool:
        view = as_torch(pool.layer(0))
        view[900] = 1
        as_torch(pool.layer(3))[0] = 1  # a layer that is not held
        torch.cuda.synchronize()
        assert torch.count_nonzero(view[:64]) == 0
        pool.grow(1000)
        assert torch.count_nonzero(view[900]) == 0
        pool.shrink(2)
        view[900] = 1
        torch.cuda.synchronize()
        assert pool.is_resident(0), "the null block stays"


def test_holes_fault() -> None:
    """In a process of its own: a fault ends the context for good."""
    program = (
        "import torch\n"
        "from tests.gpu.tools import as_torch, make_pool\n"
        "pool = make_pool()\n"
        "view = as_torch(pool.layer(0))\n"
        "view[0] = 1\n"
        "torch.cuda.synchronize()\n"
        "try:\n"
        "    view[900] = 1\n"
        "    torch.cuda.synchronize()\n"
        "except RuntimeError as error:\n"
        "    print('fault', 'illegal' in str(error), flush=True)\n"
        "import os\n"
        "os._exit(0)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.stdout.strip() == "fault True", done.stderr


def test_pages_pass_to_another_process() -> None:
    pages = pages_of(8 * MIB)
    arena = Arena(pages, PAGE)
    arena.map(0, PAGE)
    tensor = as_torch(arena.tensor(0, [PAGE], "uint8"))
    tensor.fill_(77)
    torch.cuda.synchronize()
    fd, offset, nbytes = arena.export_page(0)
    # The device of this process can import it as well; the peer is another CUDA context.
    program = (
        "import ctypes, os, sys\n"
        "from pipelive_kv.memory import open_device\n"
        "device = open_device('cuda:0')\n"
        "fd, offset, nbytes = map(int, sys.argv[1:])\n"
        "page = device.import_pages(fd, offset, nbytes)\n"
        "os.close(fd)\n"
        "cuda = ctypes.CDLL('libcuda.so.1')\n"
        "context = ctypes.c_void_p()\n"
        "assert cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), 0) == 0\n"
        "assert cuda.cuCtxSetCurrent(context) == 0\n"
        "data = ctypes.create_string_buffer(nbytes)\n"
        "address = ctypes.c_uint64(page.data_ptr)\n"
        "assert cuda.cuMemcpyDtoH_v2(data, address, ctypes.c_size_t(nbytes)) == 0\n"
        "print(set(data.raw))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(fd), str(offset), str(nbytes)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        pass_fds=[fd],
    )
    os.close(fd)
    assert done.stdout.strip() == "{77}", done.stderr
    del tensor
    arena.close()
    pages.close()


def test_an_engines_tensors_are_adopted() -> None:
    kv = torch.randn(2, 16, 32, 8, 128, device="cuda").to(torch.bfloat16)
    view = kv.permute(1, 3, 0, 2, 4)  # [block, head, 2, token, dim]
    pool = KVPool.adopt(SPEC, {0: view, 2: view.clone()})
    assert pool.layer(0).device == "cuda:0"
    assert pool.layer(0).data_ptr == kv.data_ptr()
    as_torch(pool.layer(0))[3] = 1
    assert (view[3] == 1).all()
    with pytest.raises(InvalidArgumentError, match="another device"):
        KVPool.adopt(SPEC, {0: view, 1: view.cpu()})


def test_a_device_that_is_not_there() -> None:
    with pytest.raises(InvalidArgumentError, match="device is 99"):
        open_device("cuda:99")


def test_a_thread_without_a_context_may_call() -> None:
    with make_pool() as pool:
        errors: list[BaseException] = []

        def call() -> None:
            try:
                pool.grow(200)
                pool.shrink(64)
            except BaseException as error:
                errors.append(error)

        thread = threading.Thread(target=call)
        thread.start()
        thread.join(60)
        assert not errors
        assert torch.cuda.current_device() == 0

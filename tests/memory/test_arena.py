"""Arenas, and the tensors over their memory."""

from __future__ import annotations

import gc
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from memory_tools import accessible

from pipelive_kv import _core
from pipelive_kv.errors import ClosedError, InvalidArgumentError, NotResidentError
from pipelive_kv.memory import Arena, PagePool

PAGE = 4096


@pytest.fixture
def pool() -> PagePool:
    return PagePool(64 * PAGE, page_bytes=PAGE)


def test_map_rounds_up_and_unmap_leaves_a_hole(pool: PagePool) -> None:
    arena = Arena(pool, 10 * PAGE - 5)
    assert arena.reserved_bytes == 10 * PAGE
    arena.map(2 * PAGE, 2 * PAGE + 1)
    assert arena.mapped_bytes == 3 * PAGE
    assert arena.is_mapped(2 * PAGE, 3 * PAGE)
    assert not arena.is_mapped(PAGE, 2 * PAGE)
    assert not arena.is_mapped(0, 1 << 60)
    assert accessible(arena.data_ptr + 2 * PAGE)
    assert not accessible(arena.data_ptr)
    arena.unmap(2 * PAGE, PAGE)
    assert not accessible(arena.data_ptr + 2 * PAGE)
    assert accessible(arena.data_ptr + 3 * PAGE)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int64", "uint8", "bool"])
def test_tensors_share_memory_with_torch(pool: PagePool, dtype: str) -> None:
    arena = Arena(pool, 4 * PAGE)
    arena.map(0, 2 * PAGE)
    tensor = arena.tensor(PAGE, [3, 5, 7], dtype)
    assert (tensor.shape, tensor.strides, tensor.dtype) == ((3, 5, 7), (35, 7, 1), dtype)
    assert tensor.__dlpack_device__() == (1, 0)
    view = torch.from_dlpack(tensor)
    assert view.dtype == getattr(torch, dtype)
    assert view.shape == (3, 5, 7)
    assert view.data_ptr() == arena.data_ptr + PAGE == tensor.data_ptr
    view.fill_(1)
    again = torch.from_dlpack(arena.tensor(PAGE, [3, 5, 7], dtype))
    assert (again == 1).all()


def test_tensors_share_memory_with_numpy(pool: PagePool) -> None:
    arena = Arena(pool, PAGE)
    arena.map(0, PAGE)
    tensor = arena.tensor(0, [8, 4], "float32")
    writable = tensor.numpy()
    writable[:] = 2.5
    np.testing.assert_array_equal(np.from_dlpack(tensor), np.full((8, 4), 2.5, np.float32))
    assert tensor.numpy("int32")[0, 0] == np.float32(2.5).view(np.int32)
    half = arena.tensor(0, [2, 2], "bfloat16")
    assert half.as_uint16().dtype == np.uint16
    with pytest.raises(InvalidArgumentError, match="no bfloat16"):
        half.numpy()
    with pytest.raises(InvalidArgumentError, match="item size"):
        tensor.as_uint16()


def test_capsules_of_both_generations(pool: PagePool) -> None:
    arena = Arena(pool, PAGE)
    arena.map(0, PAGE)
    tensor = arena.tensor(0, [4], "float32")
    assert '"dltensor"' in repr(tensor.__dlpack__())
    assert '"dltensor"' in repr(tensor.__dlpack__(max_version=(0, 8)))
    assert '"dltensor_versioned"' in repr(tensor.__dlpack__(max_version=(1, 0)))
    assert '"dltensor_versioned"' in repr(tensor.__dlpack__(max_version=(2, 1)))
    torch.utils.dlpack.from_dlpack(tensor.__dlpack__()).fill_(3)
    torch.utils.dlpack.from_dlpack(tensor.__dlpack__(max_version=(1, 0))).add_(1)
    assert (tensor.numpy() == 4).all()
    with pytest.raises(BufferError, match="copy"):
        tensor.__dlpack__(copy=True)
    with pytest.raises(BufferError, match="another device"):
        tensor.__dlpack__(dl_device=(2, 0))
    tensor.__dlpack__(copy=False, dl_device=(1, 0), stream=None)


def test_empty_and_scalar_tensors(pool: PagePool) -> None:
    arena = Arena(pool, PAGE)
    arena.map(0, PAGE)
    assert torch.from_dlpack(arena.tensor(0, [], "int64")).shape == ()
    assert torch.from_dlpack(arena.tensor(0, [0, 3], "int64")).shape == (0, 3)
    assert arena.tensor(0, [0, 3], "int64").nbytes == 0


def test_tensors_keep_the_addresses_reserved() -> None:
    device = _core.HostDevice()
    arena = Arena(PagePool(4 * PAGE, page_bytes=PAGE, device=device), 4 * PAGE)
    arena.map(0, PAGE)
    view = torch.from_dlpack(arena.tensor(0, [4], "float32"))
    view.fill_(7)
    del arena
    gc.collect()
    assert view.tolist() == [7.0] * 4
    assert device.usage().reserved_bytes == 4 * PAGE
    del view
    gc.collect()
    assert device.usage().reserved_bytes == 0
    assert device.usage().page_bytes == 0


def test_a_second_process_maps_an_exported_page(pool: PagePool) -> None:
    arena = Arena(pool, 4 * PAGE)
    arena.map(0, 2 * PAGE)
    values = arena.tensor(PAGE, [PAGE], "uint8").numpy()
    values[:3] = [1, 2, 3]
    fd, offset, nbytes = arena.export_page(PAGE)
    script = (
        "import sys\n"
        "from pipelive_kv import _core\n"
        "fd, offset, nbytes = map(int, sys.argv[1:])\n"
        "page = memoryview(_core.HostDevice().import_pages(fd, offset, nbytes))\n"
        "assert bytes(page[:3]) == bytes([1, 2, 3])\n"
        "page[3] = 4\n"
    )
    try:
        subprocess.run(
            [sys.executable, "-c", script, str(fd), str(offset), str(nbytes)],
            pass_fds=[fd],
            check=True,
            timeout=60,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )
    finally:
        os.close(fd)
    assert values[3] == 4


def test_bytes_are_written_and_read(pool: PagePool) -> None:
    with Arena(pool, 4 * pool.page_bytes) as arena:
        arena.map(pool.page_bytes, pool.page_bytes)
        values = np.arange(100, dtype=np.float32)
        arena.write(pool.page_bytes + 8, values)
        back = np.empty_like(values)
        arena.read(pool.page_bytes + 8, back)
        assert (back == values).all()
        arena.write(pool.page_bytes, b"abc")
        raw = bytearray(3)
        arena.read(pool.page_bytes, raw)
        assert raw == b"abc"
        with pytest.raises(NotResidentError, match="write: not all of the 400 bytes at offset 0"):
            arena.write(0, values)
        with pytest.raises(InvalidArgumentError, match="target"):
            arena.read(pool.page_bytes, b"abc")
        with pytest.raises(InvalidArgumentError, match="source"):
            arena.write(pool.page_bytes, np.zeros((4, 4))[:, ::2])


def test_refuses_wrong_arguments(pool: PagePool) -> None:
    with pytest.raises(InvalidArgumentError, match="reserve_bytes is 0"):
        Arena(pool, 0)
    arena = Arena(pool, 8 * PAGE)
    arena.map(0, PAGE)
    for offset, nbytes, message in [
        (1, PAGE, "offset is 1"),
        (-PAGE, PAGE, "offset is -4096"),
        (0, -1, "nbytes is -1"),
        (PAGE, 8 * PAGE, "leave the arena"),
        (0, 2 * PAGE, "mapped already"),
        (0.0, PAGE, "offset is 0.0"),
    ]:
        with pytest.raises(InvalidArgumentError, match=message):
            arena.map(offset, nbytes)  # type: ignore[arg-type]
    with pytest.raises(InvalidArgumentError, match="no page at offset"):
        arena.unmap(PAGE, PAGE)
    with pytest.raises(InvalidArgumentError, match="multiple of the item size"):
        arena.tensor(2, [4], "float32")
    with pytest.raises(InvalidArgumentError, match="does not fit"):
        arena.tensor(0, [1 << 40, 1 << 40], "float32")
    with pytest.raises(InvalidArgumentError, match="shape is -1"):
        arena.tensor(0, [-1], "float32")
    with pytest.raises(InvalidArgumentError, match="dtype is 'float33'"):
        arena.tensor(0, [1], "float33")
    with pytest.raises(NotResidentError, match="not all of the 4100 bytes"):
        arena.tensor(0, [1025], "float32")
    with pytest.raises(NotResidentError):
        arena.export_page(PAGE)
    assert arena.mapped_bytes == pool.used_bytes == PAGE


def test_a_closed_arena_refuses(pool: PagePool) -> None:
    with Arena(pool, 4 * PAGE) as arena:
        arena.map(0, 4 * PAGE)
    assert arena.closed
    assert pool.used_bytes == 0
    arena.close()
    for action in (
        lambda: arena.map(0, PAGE),
        lambda: arena.unmap(0, PAGE),
        lambda: arena.tensor(0, [1], "uint8"),
        lambda: arena.export_page(0),
    ):
        with pytest.raises(ClosedError):
            action()
    assert not accessible(arena.data_ptr)


def test_scrub_hides_what_others_left(pool: PagePool) -> None:
    weights = Arena(pool, 64 * PAGE)
    weights.map(0, 64 * PAGE)
    weights.tensor(0, [64 * PAGE], "uint8").numpy()[:] = 0xFF
    weights.close()
    kv = Arena(pool, 64 * PAGE, scrub=True)
    kv.map(0, 64 * PAGE)
    assert not kv.tensor(0, [64 * PAGE], "uint8").numpy().any()
    assert pool.stats().pages_created == 64

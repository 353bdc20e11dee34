"""KV pools as Python sees them: views, resizing, stacks, budgets, refusals."""

from __future__ import annotations

import ctypes
import gc
import os

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipelive_kv import _core
from pipelive_kv.errors import (
    BusyError,
    ClosedError,
    InvalidArgumentError,
    NotResidentError,
    OverBudgetError,
)
from pipelive_kv.kv import KVPool, blocks_that_fit, bytes_needed
from pipelive_kv.memory import Arena, PagePool
from pipelive_kv.spec import KVSpec

PAGE = 4096
SPEC = KVSpec(num_kv_heads=2, head_dim=8, block_size=4)


def make(**arguments: object) -> KVPool:
    defaults: dict[str, object] = {
        "num_layers": 6,
        "layers": [0, 1],
        "max_blocks": 500,
        "capacity": 10,
        "page_bytes": PAGE,
    }
    return KVPool(SPEC, **{**defaults, **arguments})  # type: ignore[arg-type]


def accessible(address: int) -> bool:
    read_end, write_end = os.pipe()
    try:
        return int(ctypes.CDLL(None).write(write_end, ctypes.c_void_p(address), 1)) == 1
    finally:
        os.close(read_end)
        os.close(write_end)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("order", ["hnd", "nhd"])
def test_views_are_canonical_whatever_the_order(dtype: str, order: str) -> None:
    spec = KVSpec(3, 8, dtype, 4, order)  # type: ignore[arg-type]
    pool = KVPool(
        spec, num_layers=3, layers=[0, 1], stack=2, max_blocks=9, capacity=9, page_bytes=PAGE
    )
    view = pool.layer(1)
    assert view.shape == (9, 3, 2, 4, 8)
    assert (view.layer, view.dtype, view.device, view.resident_blocks) == (1, dtype, "cpu", 9)
    tensor = torch.from_dlpack(view)
    assert tensor.shape == view.shape
    assert tensor.stride() == view.strides
    assert tensor.data_ptr() == view.data_ptr
    assert tensor.dtype == getattr(torch, dtype)
    tensor.copy_(torch.randn(view.shape))
    key, value = torch.from_dlpack(view.key), torch.from_dlpack(view.value)
    assert torch.equal(key, tensor[:, :, 0])
    assert torch.equal(value, tensor[:, :, 1])
    key.fill_(5)
    assert (tensor[:, :, 0] == 5).all()
    # The memory order is what the spec says.
    block = {"hnd": (3, 2, 4, 8), "nhd": (2, 4, 3, 8)}[order]
    raw = tensor.as_strided((9, *block), (view.strides[0], *np.cumprod((1, *block[:0:-1]))[::-1]))
    axes = {"hnd": (0, 1, 2, 3, 4), "nhd": (0, 3, 1, 2, 4)}[order]
    assert torch.equal(raw.permute(axes), tensor)


def test_bfloat16_as_numpy() -> None:
    pool = make()
    view = pool.layer(0)
    bits = view.as_uint16()
    torch.from_dlpack(view)[3].fill_(1.0)
    assert (bits[3] == 0x3F80).all()
    assert not bits[4].any()
    with pytest.raises(InvalidArgumentError, match="no bfloat16"):
        view.numpy()


def test_legacy_consumers_get_a_legacy_capsule() -> None:
    view = make().layer(0)
    assert '"dltensor"' in repr(view.__dlpack__())
    assert torch.utils.dlpack.from_dlpack(view.__dlpack__()).data_ptr() == view.data_ptr
    assert view.__dlpack_device__() == (1, 0)


def test_views_survive_resizing() -> None:
    pool = make(capacity=400)
    tensors = [torch.from_dlpack(pool.layer(layer)) for layer in (0, 1)]
    for layer, tensor in enumerate(tensors):
        tensor[5] = layer + 1
        tensor[300] = layer + 10
    pool.shrink(50, live=[5, 300], moves={300: 6})
    pool.grow(500)
    pool.add_layers([2])
    for layer, tensor in enumerate(tensors):
        assert tensor.data_ptr() == pool.layer(layer).data_ptr
        assert (tensor[5] == layer + 1).all()
        assert (tensor[6] == layer + 10).all()
        assert not tensor[50:].any()
    assert pool.layer(0) is pool.layer(0)
    assert pool.layer(5).resident_blocks == 0


def test_shrink_says_what_is_in_the_way() -> None:
    pool = make(capacity=100)
    with pytest.raises(BusyError, match=r"21 live blocks stand in the way: 50, 51, .* 13 more"):
        pool.shrink(50, live=range(40, 71))
    with pytest.raises(InvalidArgumentError, match="41, which is live"):
        pool.shrink(50, live=[60, 41], moves={60: 41})
    assert pool.capacity == 100


def test_a_hole_faults_and_scratch_does_not() -> None:
    pool = make()
    far = pool.layer(0).data_ptr + 400 * SPEC.block_bytes
    assert not accessible(far)
    assert not accessible(pool.layer(3).data_ptr)
    soft = make(holes="scratch")
    tensor = torch.from_dlpack(soft.layer(0))
    tensor[400] = 1
    torch.from_dlpack(soft.layer(3))[7] = 2
    assert not tensor[:10].any()
    with pytest.raises(NotResidentError, match="block 10 of layer 0"):
        soft.layer(0).check_resident([9, 10])
    with pytest.raises(NotResidentError, match="layer 3 is not held"):
        soft.layer(3).check_resident([0])


def test_stacks_move_whole() -> None:
    pool = make(stack=4, layers=[0, 1, 2, 3])
    assert pool.layer(1).data_ptr - pool.layer(0).data_ptr == SPEC.block_bytes
    with pytest.raises(InvalidArgumentError, match="stack 1 holds layers 4 to 5"):
        pool.add_layers([4])
    pool.add_layers([5, 4])
    pool.drop_layers([0, 3, 2, 1])
    assert pool.layers == (4, 5)
    with pytest.raises(InvalidArgumentError, match="layer 0 is not held"):
        pool.drop_layers(range(4))
    with pytest.raises(InvalidArgumentError, match="layer 4 is held already"):
        pool.add_layers([4, 5])


def test_weights_and_blocks_share_pages() -> None:
    pages = PagePool(64 * PAGE, page_bytes=PAGE)
    pool = KVPool(SPEC, num_layers=2, layers=[0, 1], max_blocks=1000, capacity=512, page_pool=pages)
    assert pages.used_bytes == 64 * PAGE
    weights = Arena(pages, 32 * PAGE)
    with pytest.raises(OverBudgetError):
        weights.map(0, PAGE)
    pool.shrink(256)
    weights.map(0, 32 * PAGE)
    weights.tensor(0, [32 * PAGE], "uint8").numpy()[:] = 0xFF
    with pytest.raises(OverBudgetError):
        pool.grow(300)
    weights.unmap(0, 32 * PAGE)
    pool.grow(512)
    assert pages.stats().pages_created == 64
    # 0xFFFF is a NaN of bfloat16.
    assert not torch.from_dlpack(pool.layer(1))[:512].isnan().any()


def test_statistics() -> None:
    pool = make(capacity=100)
    stats = pool.stats(live=25)
    assert (stats.capacity, stats.max_blocks, stats.layers_held) == (100, 500, 2)
    assert stats.used_bytes == 25 * 2 * SPEC.block_bytes
    assert stats.held_bytes == pool.page_pool.used_bytes == 2 * 7 * PAGE
    assert stats.utilisation == pytest.approx(25 * 256 / (7 * PAGE))
    assert pool.stats().live_blocks == 100
    pool.drop_layers([0, 1])
    assert pool.stats().utilisation == 0
    with pytest.raises(InvalidArgumentError, match="live is 101"):
        pool.stats(live=101)


@given(
    st.data(),
    st.integers(1, 8),
    st.integers(1, 40),
    st.sampled_from([512, 4096, 65536]),
    st.sampled_from(["fault", "scratch"]),
)
def test_budget_and_capacity_are_inverse(
    data: st.DataObject, num_layers: int, head_dim: int, page_bytes: int, holes: str
) -> None:
    spec = KVSpec(data.draw(st.integers(1, 3)), head_dim, "float16", 4)
    stack = data.draw(st.integers(1, num_layers))
    layers = data.draw(st.sets(st.integers(0, num_layers - 1)))
    shape = {"num_layers": num_layers, "stack": stack, "page_bytes": page_bytes, "holes": holes}
    capacity = data.draw(st.integers(1, 2000))
    needed = bytes_needed(spec, layers, capacity, **shape)  # type: ignore[arg-type]
    assert needed % page_bytes == 0
    fits = blocks_that_fit(spec, layers, needed, max_blocks=2000, **shape)  # type: ignore[arg-type]
    assert fits >= capacity
    assert bytes_needed(spec, layers, fits, **shape) == needed  # type: ignore[arg-type]
    if needed > 0:
        less = blocks_that_fit(
            spec,
            layers,
            needed - 1,
            max_blocks=2000,
            **shape,  # type: ignore[arg-type]
        )
        assert less < capacity or not layers
    # A partly named stack costs as much as the whole one.
    whole = {n for n in range(num_layers) if n // stack in {layer // stack for layer in layers}}
    assert bytes_needed(spec, whole, capacity, **shape) == needed  # type: ignore[arg-type]


def test_a_pool_holds_what_it_says_it_needs() -> None:
    for holes in ("fault", "scratch"):
        pool = make(capacity=77, stack=2, holes=holes)
        assert pool.page_pool.used_bytes == pool.bytes_needed([0, 1], 77)
        assert pool.bytes_needed(2, 77) == pool.bytes_needed([0], 77)
        room = pool.bytes_needed(4, 200)
        assert pool.blocks_that_fit(range(4), room) >= 200
        with make(layers=[], budget=room, stack=2, holes=holes) as other:
            other.add_layers(range(4))
            other.grow(pool.blocks_that_fit(4, room))
            if other.capacity < 500:
                with pytest.raises(OverBudgetError):
                    other.grow(other.capacity + 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_layers": 0}, "num_layers is 0"),
        ({"layers": [6]}, "layer 6 is not in the model"),
        ({"layers": [0, 0]}, "layer 0 is named twice"),
        ({"layers": [-1]}, "layers is -1"),
        ({"layers": 3}, "layers is 3"),
        ({"max_blocks": 0}, "max_blocks is 0"),
        ({"max_blocks": 1 << 40}, "max_blocks"),
        ({"capacity": 0}, "capacity is 0"),
        ({"capacity": 501}, "capacity is 501"),
        ({"stack": 0}, "stack is 0"),
        ({"stack": 7}, "stack is 7"),
        ({"stack": 3}, "stack 0 holds layers 0 to 2"),
        ({"page_bytes": 1000}, "page_bytes is 1000"),
        ({"holes": "zero"}, "holes is 'zero'"),
        ({"device": "gpu:0"}, "device is 'gpu:0'"),
        ({"budget": "many"}, "budget is 'many'"),
        ({"budget": PAGE, "page_pool": PagePool(PAGE, page_bytes=PAGE)}, "exclude each other"),
    ],
)
def test_refuses_arguments(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        make(**arguments)


def test_refuses_calls() -> None:
    pool = make(capacity=100)
    cases = [
        (lambda: pool.grow(99), "at least the present 100"),
        (lambda: pool.grow(501), "capacity is 501"),
        (lambda: pool.grow("9"), "capacity is '9'"),
        (lambda: pool.shrink(101), "at most the present 100"),
        (lambda: pool.shrink(0), "capacity is 0"),
        (lambda: pool.shrink(50, live=[-1]), "live is -1"),
        (lambda: pool.shrink(50, live=[1], moves={1: -2}), "moves is -2"),
        (lambda: pool.shrink(50, live=[0], moves={0: 2}), "block 0 never moves"),
        (lambda: pool.shrink(50, live=[60, 61], moves={60: 2, 61: 2}), "part of another move"),
        (lambda: pool.shrink(50, live=[60, 7], moves={60: 7, 7: 8}), "part of another move"),
        (lambda: pool.move_blocks({1: 100}), "expected a target below 100"),
        (lambda: pool.move_blocks({1: 2, 2: 3}), "part of another move"),
        (lambda: pool.layer(6), "layer is 6"),
        (lambda: pool.layer(-1), "layer is -1"),
        (lambda: pool.add_layers([9]), "layer 9 is not in the model"),
        (lambda: pool.add_layers([1]), "layer 1 is held already"),
        (lambda: pool.drop_layers([5]), "layer 5 is not held"),
        (lambda: pool.drop_layers([0, 0]), "layer 0 is named twice"),
        (lambda: pool.bytes_needed(7, 1), "layers is 7"),
        (lambda: pool.bytes_needed([0], 501), "capacity is 501"),
        (lambda: pool.blocks_that_fit([0], -1), "budget_bytes is -1"),
    ]
    for call, message in cases:
        with pytest.raises(InvalidArgumentError, match=message):
            call()
    with pytest.raises(NotResidentError, match="below 100"):
        pool.move_blocks({100: 1})
    assert not pool.is_resident(-1)
    assert pool.is_resident(99)
    assert not pool.is_resident(100)
    assert (pool.capacity, pool.layers) == (100, (0, 1))


def test_over_budget_changes_nothing() -> None:
    pool = make(budget=10 * PAGE, capacity=16)
    torch.from_dlpack(pool.layer(0))[:16] = 3
    with pytest.raises(OverBudgetError, match="pages of 4096 bytes do not fit"):
        pool.grow(500)
    pool.add_layers([2, 3])
    with pytest.raises(OverBudgetError):
        pool.grow(64)
    assert (pool.capacity, pool.layers) == (16, (0, 1, 2, 3))
    assert (torch.from_dlpack(pool.layer(0))[:16] == 3).all()


def test_a_closed_pool_refuses() -> None:
    with make() as pool:
        view = pool.layer(0)
    pool.close()
    assert pool.closed
    assert pool.page_pool.closed
    for call in (
        lambda: pool.grow(20),
        lambda: pool.shrink(5),
        lambda: pool.add_layers([2]),
        lambda: pool.drop_layers([0]),
        lambda: pool.move_blocks({1: 2}),
        lambda: pool.layer(0),
        view.__dlpack__,
        view.as_uint16,
        lambda: view.check_resident([0]),
    ):
        with pytest.raises(ClosedError):
            call()
    assert view.resident_blocks == 0
    assert not accessible(view.data_ptr)


def test_a_shared_page_pool_outlives_the_pool() -> None:
    pages = PagePool(64 * PAGE, page_bytes=PAGE)
    pool = KVPool(SPEC, num_layers=1, layers=[0], max_blocks=8, page_pool=pages)
    pool.close()
    assert not pages.closed
    assert pages.used_bytes == 0


def test_views_keep_memory_alive() -> None:
    device = _core.HostDevice()
    pool = make(device=device)
    tensor = torch.from_dlpack(pool.layer(0))
    tensor[9] = 4
    del pool
    gc.collect()
    assert (tensor[9] == 4).all()
    del tensor
    gc.collect()
    usage = device.usage()
    assert (usage.reserved_bytes, usage.page_bytes, usage.mapped_bytes) == (0, 0, 0)


def test_back_and_forth_leaks_nothing() -> None:
    device = _core.HostDevice()
    pool = make(device=device, budget=32 * PAGE)
    descriptors = len(os.listdir("/proc/self/fd"))
    mappings = sum(1 for _ in open("/proc/self/maps"))  # noqa: SIM115
    before = device.usage()
    for _ in range(300):
        pool.add_layers([2, 3])
        pool.drop_layers([0, 1])
        pool.grow(100)
        pool.shrink(10, live=[1, 99], moves={99: 2})
        pool.add_layers([0, 1])
        pool.drop_layers([2, 3])
        pool.page_pool.trim()
    after = device.usage()
    assert (after.page_bytes, after.mapped_bytes) == (before.page_bytes, before.mapped_bytes)
    assert after.reserved_bytes == before.reserved_bytes
    assert len(os.listdir("/proc/self/fd")) == descriptors
    assert abs(sum(1 for _ in open("/proc/self/maps")) - mappings) < 16  # noqa: SIM115

"""KV tensors that an engine allocated itself."""

from __future__ import annotations

import gc
import weakref

import numpy as np
import pytest
import torch

from pipelive_kv.errors import (
    BusyError,
    ClosedError,
    InvalidArgumentError,
    NotResidentError,
)
from pipelive_kv.kv import KVPool
from pipelive_kv.spec import KVSpec

SPEC = KVSpec(2, 8, "bfloat16", 4)


def engine_tensor(blocks: int = 6, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Laid out [2, block, token, head, dim], seen as [block, head, 2, token, dim]."""
    return torch.randn(2, blocks, 4, 2, 8).to(dtype).permute(1, 3, 0, 2, 4)


def test_views_are_the_engines_memory() -> None:
    tensors = {1: engine_tensor(), 3: engine_tensor()}
    pool = KVPool.adopt(SPEC, tensors, num_layers=5)
    assert (pool.layers, pool.num_layers, pool.capacity, pool.max_blocks) == ((1, 3), 5, 6, 6)
    view = pool.layer(3)
    assert view.shape == (6, 2, 2, 4, 8)
    assert view.strides == tensors[3].stride()
    assert view.data_ptr == tensors[3].data_ptr()
    torch.from_dlpack(view)[2] = 9
    assert (tensors[3][2] == 9).all()
    assert torch.equal(torch.from_dlpack(view.value), tensors[3][:, :, 1])
    view.check_resident(range(6))
    with pytest.raises(NotResidentError, match="block 6 of layer 3"):
        view.check_resident([6])
    assert pool.is_resident(5)
    assert not pool.is_resident(6)


def test_numpy_arrays_are_adopted_too() -> None:
    spec = KVSpec(2, 8, "float32", 4)
    array = np.zeros((3, 2, 2, 4, 8), np.float32)
    pool = KVPool.adopt(spec, {0: array})
    pool.layer(0).numpy()[1] = 2
    assert (array[1] == 2).all()
    array.flags.writeable = False
    with pytest.raises((InvalidArgumentError, BufferError), match=r"read-?only"):
        KVPool.adopt(spec, {0: array})


def test_resizing_is_the_engines_business() -> None:
    pool = KVPool.adopt(SPEC, {0: engine_tensor()})
    pool.grow(6)
    pool.shrink(6, live=[3])
    for call in (
        lambda: pool.grow(7),
        lambda: pool.shrink(5),
        lambda: pool.shrink(6, live=[3], moves={3: 2}),
        lambda: pool.add_layers([1]),
        lambda: pool.drop_layers([0]),
    ):
        with pytest.raises(BusyError, match="the engine owns the memory"):
            call()


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (engine_tensor(dtype=torch.float16), r"tensors\[0\] has dtype float16"),
        (engine_tensor()[0], "expected 5 axes"),
        (engine_tensor().permute(0, 2, 1, 3, 4)[:, :, :1], r"expected \[blocks, 2, 2, 4, 8\]"),
        (torch.zeros(6, 2, 2, 4, 16, dtype=torch.bfloat16)[..., ::2], "last axis"),
        (torch.zeros(1, 2, 2, 4, 8, dtype=torch.bfloat16).expand(6, -1, -1, -1, -1), "share"),
        (torch.zeros(0, 2, 2, 4, 8, dtype=torch.bfloat16), "layer 0 has"),
    ],
)
def test_refuses_tensors_that_do_not_fit(tensor: torch.Tensor, message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        KVPool.adopt(SPEC, {0: tensor})


class Elsewhere:
    """Says that it lies on a GPU, and lends nothing."""

    def __init__(self, index: int) -> None:
        self.index = index

    def __dlpack_device__(self) -> tuple[int, int]:
        return 2, self.index

    def __dlpack__(self, **_: object) -> object:
        raise BufferError("not from this device")


def test_refuses_tensors_on_two_gpus() -> None:
    tensors = {0: Elsewhere(0), 1: Elsewhere(0), 3: Elsewhere(1)}
    message = r"several devices, expected one: tensors\[0\] on GPU 0, tensors\[3\] on GPU 1"
    with pytest.raises(InvalidArgumentError, match=message):
        KVPool.adopt(SPEC, tensors)


def test_refuses_other_mistakes() -> None:
    with pytest.raises(TypeError, match=r"tensors\[0\] is a list"):
        KVPool.adopt(SPEC, {0: [1, 2]})  # type: ignore[dict-item]
    with pytest.raises(InvalidArgumentError, match="layer 4"):
        KVPool.adopt(SPEC, {4: engine_tensor()}, num_layers=4)
    with pytest.raises(InvalidArgumentError, match="the others have 6"):
        KVPool.adopt(SPEC, {0: engine_tensor(), 1: engine_tensor(7)})
    with pytest.raises(InvalidArgumentError, match="0 tensors"):
        KVPool.adopt(SPEC, {})
    with pytest.raises(InvalidArgumentError, match="not adopted"):
        KVPool.adopt(SPEC, {0: engine_tensor()}).layer(1)


def test_tensors_live_as_long_as_views() -> None:
    tensor = engine_tensor()
    storage = weakref.ref(tensor)
    pool = KVPool.adopt(SPEC, {0: tensor})
    view = pool.layer(0)
    address = tensor.data_ptr()
    del tensor
    pool.close()
    with pytest.raises(ClosedError):
        view.__dlpack__()
    with pytest.raises(ClosedError):
        pool.layer(0)
    assert view.data_ptr == address
    del pool, view
    gc.collect()
    assert storage() is None

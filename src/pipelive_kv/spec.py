"""The shape of the KV state that every layer of a model keeps."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from pipelive_kv import _core

__all__ = ["KVSpec"]


@dataclass(frozen=True)
class KVSpec:
    """What one layer stores per token, and how tokens are grouped into blocks.

    ``num_kv_heads`` counts key/value heads (not query heads), ``head_dim`` the numbers of one head,
    ``block_size`` the tokens of a block. ``order`` is the order of a block's axes in memory:
    ``"hnd"`` is ``[kv_head, 2, token, dim]``, ``"nhd"`` is ``[2, token, kv_head, dim]``.

    Raises InvalidArgumentError naming the field that is out of range.
    """

    num_kv_heads: int
    head_dim: int
    dtype: Literal["float32", "float16", "bfloat16"] = "bfloat16"
    block_size: int = 16
    order: Literal["hnd", "nhd"] = "hnd"

    def __post_init__(self) -> None:
        for name in ("num_kv_heads", "head_dim", "block_size"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 1 << 32:
                raise _core.InvalidArgumentError(
                    f"KVSpec.{name} is {value!r}, expected a positive integer"
                )
        for name in ("dtype", "order"):
            value = getattr(self, name)
            if not isinstance(value, str):
                raise _core.InvalidArgumentError(f"KVSpec.{name} is {value!r}, expected a name")
        _ = self.core

    @cached_property
    def core(self) -> _core.KVSpec:
        """The same specification as the compiled core takes it."""
        return _core.KVSpec(
            self.num_kv_heads, self.head_dim, self.dtype, self.block_size, self.order
        )

    @property
    def block_bytes(self) -> int:
        """Bytes of one block of one layer."""
        return self.core.block_bytes

    @property
    def slot_bytes(self) -> int:
        """Bytes of one token's K and V in one layer."""
        return self.core.slot_bytes

    @classmethod
    def from_core(cls, spec: _core.KVSpec) -> KVSpec:
        """The inverse of :attr:`core`."""
        return cls(spec.num_kv_heads, spec.head_dim, spec.dtype, spec.block_size, spec.order)

    def __reduce__(self) -> tuple[type[KVSpec], tuple[object, ...]]:
        return (
            type(self),
            (self.num_kv_heads, self.head_dim, self.dtype, self.block_size, self.order),
        )

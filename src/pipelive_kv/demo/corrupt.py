"""The negative control: a defect on purpose, which the comparison of tokens has to find."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from pipelive_kv.placement import Placement
from pipelive_kv.stage import EngineHooks

if TYPE_CHECKING:
    from pipelive_kv.kv import KVPool
    from pipelive_kv.stage import LayerWeights


class ZeroMovedLayer(EngineHooks):
    """Hands everything on to other hooks, but loses the KV of one gained layer at the switchover.

    Args:
        hooks: the engine's.
        pool: the stage's KV.
    """

    def __init__(self, hooks: EngineHooks, pool: KVPool) -> None:
        self._hooks = hooks
        self._pool = pool
        self._gained: tuple[int, ...] = ()

    def prepare(self, layers: Sequence[int], arena: LayerWeights | None) -> None:
        """Remember what is gained."""
        self._gained = tuple(layers)
        self._hooks.prepare(layers, arena)

    def warmup(self, placement: Placement) -> None:
        """Hand on."""
        self._hooks.warmup(placement)

    def activate(self, placement: Placement) -> None:
        """Hand on, then zero the first gained layer's KV."""
        self._hooks.activate(placement)
        if self._gained:
            view = np.from_dlpack(self._pool.layer(self._gained[0]))
            view[: self._pool.capacity] = 0
            self._gained = ()

    def discard(self, layers: Sequence[int]) -> None:
        """Hand on."""
        self._gained = ()
        self._hooks.discard(layers)

    def retire(self, layers: Sequence[int]) -> None:
        """Hand on."""
        self._hooks.retire(layers)


def zero_moved_layer(hooks: EngineHooks, pool: KVPool) -> EngineHooks:
    """For ``EngineConfig.wrap_hooks``."""
    return ZeroMovedLayer(hooks, pool)

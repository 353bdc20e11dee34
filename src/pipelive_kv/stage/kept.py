"""Layers that a stage has given away and still holds, for a lease of the old placement."""

from __future__ import annotations

from collections.abc import Sequence

from pipelive_kv.kv import KVPool
from pipelive_kv.stage.background import Background
from pipelive_kv.stage.hooks import EngineHooks, LayerWeights, in_pool


class KeptLayers:
    """The layers in question; their KV is as it was at the switchover.

    They belong to nobody's placement. A session that takes the old placement up again gets them as
    they are, with the engine's modules still built; whatever else comes first drops them.
    """

    def __init__(
        self,
        pool: KVPool,
        weights: LayerWeights | None,
        hooks: EngineHooks,
        background: Background,
    ) -> None:
        self._pool = pool
        self._weights = weights
        self._hooks = hooks
        self._background = background
        self.layers: tuple[int, ...] = ()

    def keep(self, layers: Sequence[int]) -> None:
        """These layers have been given away, and stay."""
        self.layers = tuple(layers)

    def take(self) -> None:
        """A session has them now."""
        self.layers = ()

    def drop(self) -> None:
        """Nobody will want them; without such layers nothing happens."""
        layers, self.layers = self.layers, ()
        self.give_back(layers)

    def give_back(self, layers: Sequence[int]) -> None:
        """Give back all that layers take which another stage runs now."""
        if layers:
            self._background.run(lambda: self._give_back(layers))

    def _give_back(self, layers: Sequence[int]) -> None:
        self._hooks.retire(tuple(layers))
        self._pool.drop_layers(tuple(layers))
        if self._weights is not None:
            for layer in layers:
                self._weights.drop(layer)
        if not in_pool(self._weights):
            self._pool.page_pool.trim()

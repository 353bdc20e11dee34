"""The taking side of a move: room for layers, their weights, their KV, and the gate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pipelive_kv.kv import KVPool
from pipelive_kv.stage.background import Background
from pipelive_kv.stage.hooks import EngineHooks, LayerWeights, in_pool
from pipelive_kv.stage.incoming import Incoming


class TargetSession:
    """Everything a stage holds for the layers it gains, until they are its own or discarded."""

    def __init__(
        self,
        epoch: int,
        layers: tuple[int, ...],
        pool: KVPool,
        weights: LayerWeights | None,
        hooks: EngineHooks,
        background: Background,
        *,
        weights_from: str,
        verify: bool,
        ends_at: float,
        kept: bool = False,
    ) -> None:
        """With ``kept``, the stage has the layers, built and loaded; see `KeptLayers`."""
        self.epoch = epoch
        self.layers = layers
        self._kept = kept
        self.weights_from = weights_from
        self._pool = pool
        self._weights = weights
        self._hooks = hooks
        self._background = background
        self._verify = verify
        self._ends_at = ends_at
        self.incoming: list[Incoming] = []
        self._source_of: dict[int, Incoming] = {}
        self._kv_added = False
        self._weights_added: list[int] = []
        self._prepared = False
        self.loaded = False

    def make_room(self) -> None:
        """Map KV and weights for the gained layers; on failure nothing stays mapped."""
        if self._kept:
            self._weights_added = list(self.layers) if self._weights is not None else []
            self._kv_added = self._prepared = bool(self.layers)
            return
        try:
            if self._weights is not None:
                for layer in self.layers:
                    self._weights.add(layer)
                    self._weights_added.append(layer)
            if self.layers:
                self._background.run(lambda: self._pool.add_layers(self.layers))
                self._kv_added = True
            self._trim()
        except BaseException:
            self.discard()
            raise

    def listen(self, incoming: Incoming) -> None:
        """Take over the connection that one source's layers come through."""
        self.incoming.append(incoming)
        for layer in incoming.layers:
            self._source_of[layer] = incoming

    def regions(self, layers: Sequence[int]) -> Mapping[int, Any]:
        """Where weights from the source stage land, per layer; empty if they come otherwise."""
        if self.weights_from != "peer" or self._weights is None or self._kept:
            return {}
        return {layer: self._weights.region(layer) for layer in layers}

    def load(self, timeout: float) -> None:
        """Fill the weights and let the engine prepare the layers."""
        if self._kept:
            self.loaded = True
            return
        if self._weights is not None and self.weights_from == "source":
            # Reading a file and copying from it overlap when two layers are under way.
            with self._background.threads(2) as pool:
                for done in [pool.submit(self._weights.load, layer) for layer in self.layers]:
                    done.result(timeout=timeout)
        elif self._weights is not None:
            for layer in self.layers:
                receiver = self._source_of[layer].receiver(timeout)
                receiver.wait_region(layer, timeout=timeout)
                self._weights.landed(layer)
        if self.layers:
            self._prepared = True
            self._hooks.prepare(self.layers, self._weights)
        self.loaded = True

    def arm(self) -> None:
        """Vote: from here on a connection that is lost may be made again.

        Raises what went wrong with a connection, if something did.
        """
        for incoming in self.incoming:
            incoming.arm()

    def gate(self, layer: int, through: int, timeout: float) -> None:
        """Wait until ``layer`` holds all writes of the steps up to ``through``."""
        incoming = self._source_of.get(layer)
        if incoming is None:
            return
        incoming.wait_applied(through, timeout)
        if self._verify:
            incoming.wait_finished(timeout)

    def finish(self, timeout: float) -> None:
        """Wait until every source has ended its transfer; the layers are the stage's own now."""
        for incoming in self.incoming:
            incoming.wait_finished(timeout)

    def interrupt(self) -> None:
        """End what waits for a source, without waiting for the end."""
        for incoming in tuple(self.incoming):
            incoming.interrupt()

    def discard(self) -> None:
        """Cancel the transfers and give everything back that was gained."""
        for incoming in self.incoming:
            incoming.cancel()
        self.incoming.clear()
        self._source_of.clear()
        if self._prepared:
            self._prepared = False
            (self._hooks.retire if self._kept else self._hooks.discard)(self.layers)
        if self._kv_added:
            self._kv_added = False
            self._pool.drop_layers(self.layers)
        while self._weights_added and self._weights is not None:
            self._weights.drop(self._weights_added.pop())
        self._trim()

    def _trim(self) -> None:
        if not in_pool(self._weights):
            self._background.run(self._pool.page_pool.trim)

"""What the engine does at each point of a reconfiguration, and where its weights live."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from pipelive_kv.placement import Placement


class LayerWeights(Protocol):
    """The weights of the layers that a stage holds; :class:`pipelive_kv.WeightArena` is one.

    One whose weights lie elsewhere than in the pages of the KV's pool says so by an attribute
    ``in_pool`` that is False: they count in the pool's budget, and pages that the KV sets free go
    back to the system before other weights come, since nothing could reuse them.
    """

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers whose weights are mapped, ascending."""

    def layer_bytes(self, layer: int) -> int:
        """Bytes of physical memory that the weights of ``layer`` take, rounded up to pages."""

    def add(self, layer: int) -> None:
        """Map memory for the weights of ``layer``."""

    def load(self, layer: int) -> None:
        """Fill the weights of ``layer`` from the stage's own source."""

    def region(self, layer: int) -> Any:
        """Where all bytes of the weights of ``layer`` land, as one writable buffer."""

    def landed(self, layer: int) -> None:
        """All bytes of :meth:`region` have come."""

    def outgoing(self, layer: int) -> Any:
        """All bytes of the loaded weights of ``layer`` as one buffer in host memory."""

    def drop(self, layer: int) -> None:
        """Give the memory of the weights of ``layer`` back."""


def in_pool(weights: LayerWeights | None) -> bool:
    """Whether the weights lie in the pages of the KV's pool; see :class:`LayerWeights`."""
    return bool(getattr(weights, "in_pool", True))


class EngineHooks:
    """What the engine does when its layers change. Every method may be left as it is.

    ``prepare``, ``warmup``, ``discard`` and ``retire`` run in a background thread while steps go
    on; ``activate`` runs in the engine's own thread, between two steps.
    """

    def prepare(self, layers: Sequence[int], arena: LayerWeights | None) -> None:
        """Build what it takes to run ``layers``; their weights lie in ``arena``. May fail."""

    def warmup(self, placement: Placement) -> None:
        """Do what the first step under ``placement`` would otherwise pay for. May fail."""

    def activate(self, placement: Placement) -> None:
        """Run ``placement`` from the next step on: swap pointers, allocate nothing, cannot fail."""

    def discard(self, layers: Sequence[int]) -> None:
        """Forget what :meth:`prepare` built for ``layers``: the reconfiguration was given up."""

    def retire(self, layers: Sequence[int]) -> None:
        """Forget ``layers``, which another stage runs now; their memory goes when this returns."""

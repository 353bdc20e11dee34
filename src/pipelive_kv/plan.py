"""The budget rule: what a reconfiguration costs at its peak, and whether it can be made."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from pipelive_kv.errors import InvalidArgumentError
from pipelive_kv.placement import Move, Placement, whole_stacks


@dataclass(frozen=True)
class StageBudget:
    """What one stage has to place layers in.

    Attributes:
        budget_bytes: physical memory for the KV and the weights of layers.
        layer_bytes: weight bytes of one layer, rounded up to pages; or of every layer of the model.
        block_bytes: bytes of one layer's block.
        page_bytes: the unit of physical memory.
        stack: neighbouring layers whose blocks lie side by side.
        other_bytes: what else comes out of the budget, whatever the placement.
    """

    budget_bytes: int
    layer_bytes: int | tuple[int, ...]
    block_bytes: int
    page_bytes: int = 2 << 20
    stack: int = 1
    other_bytes: int = 0

    def __post_init__(self) -> None:
        for name in ("budget_bytes", "layer_bytes", "other_bytes"):
            found = getattr(self, name)
            if (min(found, default=0) if isinstance(found, tuple) else found) < 0:
                raise InvalidArgumentError(f"{name} is {getattr(self, name)}, expected 0 or more")
        for name in ("block_bytes", "page_bytes", "stack"):
            if getattr(self, name) < 1:
                raise InvalidArgumentError(f"{name} is {getattr(self, name)}, expected 1 or more")

    def weights_of(self, layers: Iterable[int]) -> int:
        """Weight bytes of ``layers``."""
        of = self.layer_bytes
        return sum(of[layer] if isinstance(of, tuple) else of for layer in layers)

    def bytes_needed(self, num_layers: int, blocks: int) -> int:
        """Bytes that the KV of ``num_layers`` layers with ``blocks`` blocks each takes."""
        stacks = -(-num_layers // self.stack)
        pages = -(-blocks * self.stack * self.block_bytes // self.page_bytes)
        return stacks * pages * self.page_bytes

    def blocks_that_fit(self, layers: int | Sequence[int]) -> int | None:
        """The most blocks per layer that fit beside the weights; None where no layer limits it.

        This is ``floor((M*u - L*W) / (L*P))`` of the PipeLive paper (arXiv 2604.12171), with M*u
        the budget, L the layers, W a layer's weights and P a layer's block, in whole pages for
        each stack. It is negative where the weights alone do not fit.

        Args:
            layers: the layers, or how many where all are of one size.
        """
        chosen = range(layers) if isinstance(layers, int) else layers
        if not chosen:
            return None
        room = self.budget_bytes - self.other_bytes - self.weights_of(chosen)
        if room < 0:
            return -1
        stacks = -(-len(chosen) // self.stack)
        pages = room // (stacks * self.page_bytes)
        return pages * self.page_bytes // (self.stack * self.block_bytes)


@dataclass(frozen=True)
class Shortage:
    """What a stage lacks to hold the union of its layers."""

    stage: int
    layers: int
    blocks: int
    """The blocks that each layer must hold, the live ones."""
    needed_bytes: int
    budget_bytes: int

    @property
    def lacking_bytes(self) -> int:
        """By how much the budget is too small."""
        return self.needed_bytes - self.budget_bytes

    def __str__(self) -> str:
        return (
            f"stage {self.stage} lacks {self.lacking_bytes} bytes: {self.layers} layers with "
            f"{self.blocks} blocks need {self.needed_bytes}, its budget is {self.budget_bytes}"
        )


@dataclass(frozen=True)
class Plan:
    """What a reconfiguration would do to the capacity, and why it cannot be made if so."""

    moves: tuple[Move, ...]
    blocks_during: int
    """Blocks that fit on every stage while each holds the union of its layers."""
    blocks_after: int
    """Blocks that fit on every stage afterwards."""
    tightest_stage: int
    """The stage that ``blocks_during`` comes from."""
    shortages: tuple[Shortage, ...] = ()
    """Which stages lack how many bytes."""

    @property
    def reason(self) -> str:
        """Empty, or the shortages in words."""
        return "; ".join(map(str, self.shortages))

    @property
    def fits(self) -> bool:
        """Whether the reconfiguration can be made."""
        return not self.shortages


def plan(
    current: Placement,
    target: Placement,
    stages: Sequence[StageBudget],
    *,
    live_blocks: int = 0,
    max_blocks: int | None = None,
) -> Plan:
    """Work out what the reconfiguration from ``current`` to ``target`` costs, without making it.

    Args:
        current: the placement that is served.
        target: the placement wished for.
        stages: one budget per stage.
        live_blocks: blocks that must stay resident all the time, the null block included.
        max_blocks: the blocks for which addresses are reserved, if that is a limit.

    Raises:
        InvalidArgumentError: the placements are of unlike models, cut a stack in two, or there is
            not one budget per stage.
    """
    moves = tuple(current.moves_to(target))
    if len(stages) != current.num_stages:
        raise InvalidArgumentError(
            f"stages has {len(stages)} budgets, expected {current.num_stages}, one per stage"
        )
    during: list[int] = []
    after: list[int] = []
    shortages: list[Shortage] = []
    for rank, budget in enumerate(stages):
        whole_stacks([current, target], budget.stack)
        union = current.union_with(target, rank)
        for found, layers in ((during, union), (after, target.layers_of(rank))):
            fits = budget.blocks_that_fit(layers)
            if fits is None or (max_blocks is not None and fits > max_blocks):
                fits = max_blocks if max_blocks is not None else 2**63 - 1
            found.append(fits)
        least = max(live_blocks, 1)
        if during[rank] < least and union:
            needed = (
                budget.other_bytes
                + budget.weights_of(union)
                + budget.bytes_needed(len(union), least)
            )
            shortages.append(Shortage(rank, len(union), least, needed, budget.budget_bytes))
    tightest = min(range(len(during)), key=lambda rank: during[rank])
    return Plan(moves, during[tightest], min(after), tightest, tuple(shortages))

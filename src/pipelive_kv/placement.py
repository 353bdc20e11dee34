"""Placements: which stage holds which layers, and the moves from one placement to the next."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from pipelive_kv.errors import InvalidArgumentError


@dataclass(frozen=True)
class Move:
    """Neighbouring layers that go from one stage to another."""

    layers: tuple[int, ...]
    source: int
    target: int


@dataclass(frozen=True)
class Placement:
    """A map of every layer of the model to one stage.

    ``stages[rank]`` holds the layers of stage ``rank`` in ascending order; a stage may hold none,
    and may not be there then: placements of unlike numbers of stages are compared as if the shorter
    one went on with stages without a layer.
    Layers run in the order of their indices and hidden states pass from a stage to the next one,
    so the layers of a stage are neighbours and come after those of the stages before it.

    Raises:
        InvalidArgumentError: the layers are not 0 .. n-1 in pipeline order.
    """

    stages: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        if not self.stages:
            raise InvalidArgumentError("Placement.stages is empty, expected at least one stage")
        expected = 0
        for rank, layers in enumerate(self.stages):
            for layer in layers:
                if layer != expected:
                    raise InvalidArgumentError(
                        f"Placement.stages[{rank}] is {layers}, expected layer {expected} next: "
                        "layers run over the stages in ascending order without gaps"
                    )
                expected += 1
        if expected == 0:
            raise InvalidArgumentError("Placement.stages hold no layer, expected at least one")

    @classmethod
    def from_counts(cls, counts: Sequence[int]) -> Placement:
        """The placement whose stage ``rank`` holds the next ``counts[rank]`` layers."""
        stages: list[tuple[int, ...]] = []
        first = 0
        for rank, count in enumerate(counts):
            if count < 0:
                raise InvalidArgumentError(f"counts[{rank}] is {count}, expected 0 or more")
            stages.append(tuple(range(first, first + count)))
            first += count
        return cls(tuple(stages))

    @property
    def counts(self) -> tuple[int, ...]:
        """The number of layers of each stage."""
        return tuple(len(layers) for layers in self.stages)

    @property
    def num_layers(self) -> int:
        """The number of layers of the model."""
        return sum(self.counts)

    @property
    def num_stages(self) -> int:
        """The number of stages, those without a layer included."""
        return len(self.stages)

    def padded(self, num_stages: int) -> Placement:
        """The same with stages without a layer at the end, so that there are ``num_stages``."""
        return Placement(self.stages + ((),) * (num_stages - self.num_stages))

    def layers_of(self, stage: int) -> tuple[int, ...]:
        """The layers of ``stage``, ascending."""
        if not 0 <= stage < self.num_stages:
            raise InvalidArgumentError(f"stage is {stage}, expected 0 to {self.num_stages - 1}")
        return self.stages[stage]

    def stage_of(self, layer: int) -> int:
        """The stage that holds ``layer``."""
        for rank, layers in enumerate(self.stages):
            if layer in layers:
                return rank
        raise InvalidArgumentError(f"layer is {layer}, expected 0 to {self.num_layers - 1}")

    def moves_to(self, target: Placement) -> list[Move]:
        """The moves that turn this placement into ``target``, ordered by source and target."""
        self._check_same_model(target)
        moved: dict[tuple[int, int], list[int]] = {}
        for layer in range(self.num_layers):
            pair = (self.stage_of(layer), target.stage_of(layer))
            if pair[0] != pair[1]:
                moved.setdefault(pair, []).append(layer)
        return [
            Move(tuple(layers), source, goal) for (source, goal), layers in sorted(moved.items())
        ]

    def union_with(self, target: Placement, stage: int) -> tuple[int, ...]:
        """The layers that ``stage`` holds while this placement turns into ``target``."""
        self._check_same_model(target)
        size = max(self.num_stages, target.num_stages)
        own, others = self.padded(size), target.padded(size)
        return tuple(sorted({*own.layers_of(stage), *others.layers_of(stage)}))

    def _check_same_model(self, other: Placement) -> None:
        if other.num_layers != self.num_layers:
            raise InvalidArgumentError(
                f"the placement has {other.num_layers} layers on {other.num_stages} stages, "
                f"expected {self.num_layers} layers"
            )

    def __str__(self) -> str:
        return "/".join(str(count) for count in self.counts)


def whole_stacks(placements: Iterable[Placement], stack: int) -> None:
    """Check that no placement cuts a stack of ``stack`` neighbouring layers in two.

    Raises:
        InvalidArgumentError: naming the stage and the stack.
    """
    for placement in placements:
        for rank, layers in enumerate(placement.stages):
            held = set(layers)
            for layer in layers:
                first = layer // stack * stack
                whole = range(first, min(first + stack, placement.num_layers))
                if not held.issuperset(whole):
                    raise InvalidArgumentError(
                        f"placement {placement}: stage {rank} would hold a part of the stack of "
                        f"layers {whole.start} to {whole.stop - 1}; stacks move whole"
                    )

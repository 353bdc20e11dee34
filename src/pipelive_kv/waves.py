"""Which placements a pipeline can get to, and by which others, where not all fits at once.

A reconfiguration needs room for the union of a stage's layers before and after. Where that does not
fit beside the live blocks, several smaller ones may: each frees what the next one needs.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence

from pipelive_kv.placement import Placement
from pipelive_kv.plan import StageBudget

Bounds = tuple[int, ...]
"""Where each stage but the last ends: the first layer of the next one."""

_EXACT = 400
"""The number of placements on the way up to which the fewest waves are searched for."""

_LOOKED_AT = 2000
"""The number of placements that are looked at for ones that would fit."""


class Room:
    """What fits on the stages beside ``live_blocks`` blocks of every layer.

    Args:
        num_layers: of the model.
        stages: one budget per stage.
        live_blocks: blocks that stay resident all the time, the null block included.
    """

    def __init__(self, num_layers: int, stages: Sequence[StageBudget], live_blocks: int) -> None:
        self.num_layers = num_layers
        self.stages = tuple(stages)
        self.unit = math.lcm(*(budget.stack for budget in stages))
        self._least = max(live_blocks, 1)
        self._known: dict[tuple[int, int, int, int, int], bool] = {}

    def fits(self, old: Bounds, new: Bounds) -> bool:
        """Whether every stage can hold its layers of both placements at a time."""
        was, will = (0, *old, self.num_layers), (0, *new, self.num_layers)
        return all(
            self._holds(rank, was[rank], was[rank + 1], will[rank], will[rank + 1])
            for rank in range(len(self.stages))
        )

    def _holds(self, rank: int, first: int, end: int, new_first: int, new_end: int) -> bool:
        key = (rank, first, end, new_first, new_end)
        if key not in self._known:
            union = sorted({*range(first, end), *range(new_first, new_end)})
            fits = self.stages[rank].blocks_that_fit(union)
            self._known[key] = fits is None or fits >= self._least
        return self._known[key]


def waves(
    current: Placement, target: Placement, stages: Sequence[StageBudget], *, live_blocks: int = 0
) -> tuple[Placement, ...]:
    """The placements, ``target`` the last, by which the pipeline gets there.

    Every one of them, and every union of two that follow each other, fits on every stage beside the
    live blocks. No end of a stage moves to and fro. They are the fewest possible where
    there are no more than a few hundred placements between the two, else as few as going as far as
    possible each time gives. Empty where it cannot be done.

    Args:
        current: the placement that is served.
        target: the placement wished for.
        stages: one budget per stage.
        live_blocks: blocks that must stay resident all the time, the null block included.
    """
    room = Room(current.num_layers, stages, live_blocks)
    start, goal = _bounds(current), _bounds(target)
    if room.fits(start, goal):
        return (target,)
    ways = [_between(a, b, room) for a, b in zip(start, goal, strict=True)]
    if math.prod(map(len, ways)) <= _EXACT:
        found = _fewest(start, goal, ways, room)
    else:
        found = _far_each_time(start, goal, room)
    return tuple(_placement(bounds, room.num_layers) for bounds in found)


def would_fit(
    current: Placement,
    target: Placement,
    stages: Sequence[StageBudget],
    *,
    live_blocks: int = 0,
    in_waves: bool = True,
    most: int = 3,
) -> tuple[Placement, ...]:
    """Up to ``most`` placements that the pipeline could be taken to, nearest to ``target`` first.

    The distance is by how many stacks of layers the ends of the stages differ. The current
    placement is not among them.

    Args:
        current: the placement that is served.
        target: the placement wished for.
        stages: one budget per stage.
        live_blocks: blocks that must stay resident all the time, the null block included.
        in_waves: whether such count that take several reconfigurations.
        most: how many to look for.
    """
    room = Room(current.num_layers, stages, live_blocks)
    start = _bounds(current)
    found: list[Placement] = []
    for bounds in itertools.islice(_nearest(_bounds(target), room), _LOOKED_AT):
        if bounds == start or not room.fits(bounds, bounds):
            continue
        placement = _placement(bounds, room.num_layers)
        if room.fits(start, bounds) or (
            in_waves and waves(current, placement, stages, live_blocks=live_blocks)
        ):
            found.append(placement)
            if len(found) == most:
                break
    return tuple(found)


def _bounds(placement: Placement) -> Bounds:
    return tuple(itertools.accumulate(placement.counts[:-1]))


def _placement(bounds: Bounds, num_layers: int) -> Placement:
    ends = (0, *bounds, num_layers)
    return Placement.from_counts([b - a for a, b in itertools.pairwise(ends)])


def _between(start: int, goal: int, room: Room) -> list[int]:
    """Where an end may lie on its way, whole stacks apart."""
    low, high = min(start, goal), max(start, goal)
    inside = [at for at in range(0, room.num_layers, room.unit) if low < at < high]
    return sorted({low, *inside, high})


def _fewest(start: Bounds, goal: Bounds, ways: Sequence[Sequence[int]], room: Room) -> list[Bounds]:
    """Breadth first, from the goal, so that each step gets as near to it as it can."""
    open_ = {
        bounds
        for bounds in itertools.product(*ways)
        if all(a <= b for a, b in itertools.pairwise(bounds)) and room.fits(bounds, bounds)
    }
    open_.discard(goal)
    open_.add(start)
    following: dict[Bounds, Bounds] = {}
    frontier = [goal]
    while frontier and start not in following:
        reached: list[Bounds] = []
        for bounds in sorted(open_):
            step = next((near for near in frontier if room.fits(bounds, near)), None)
            if step is not None:
                following[bounds] = step
                reached.append(bounds)
        open_.difference_update(reached)
        frontier = reached
    found: list[Bounds] = []
    at = start
    while at in following:
        at = following[at]
        found.append(at)
    return found


def _far_each_time(start: Bounds, goal: Bounds, room: Room) -> list[Bounds]:
    """From each placement move every end as far as fits, until the goal is reached."""
    found: list[Bounds] = []
    at = start
    while at != goal:
        new = at
        moved = True
        while moved and new != goal:
            moved = False
            for index in range(len(goal)):
                ways = _between(new[index], goal[index], room)
                next_ = ways[min(1, len(ways) - 1)]
                if goal[index] < new[index]:
                    next_ = ways[max(0, len(ways) - 2)]
                tried = (*new[:index], next_, *new[index + 1 :])
                ordered = all(a <= b for a, b in itertools.pairwise(tried))
                if tried != new and ordered and room.fits(at, tried):
                    new, moved = tried, True
        if new == at:
            return []
        found.append(new)
        at = new
    return found


def _nearest(goal: Bounds, room: Room) -> Iterator[Bounds]:
    """All bounds, those of the smallest distance from ``goal`` first."""
    seen = {goal}
    ring = [goal]
    while ring:
        yield from ring
        following: list[Bounds] = []
        for bounds in ring:
            for index, step in itertools.product(range(len(bounds)), (-room.unit, room.unit)):
                at = bounds[index] + step
                if at > room.num_layers:
                    at = room.num_layers
                elif bounds[index] % room.unit:
                    at = bounds[index] - bounds[index] % room.unit if step < 0 else at
                new = (*bounds[:index], at, *bounds[index + 1 :])
                ends = (0, *new, room.num_layers)
                if new not in seen and all(a <= b for a, b in itertools.pairwise(ends)):
                    seen.add(new)
                    following.append(new)
        ring = following

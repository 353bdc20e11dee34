"""Block ids: who holds which, which may be handed out, and how they move in a shrink."""

from __future__ import annotations

from collections.abc import Mapping

from pipelive_kv import _core
from pipelive_kv.tracker import Integers


class BlockAllocator:
    """Reference-counted block ids, handed out lowest first.

    Bookkeeping only; the memory belongs to the stages' pools, which follow. Id 0 is the null block:
    always live, never handed out, shared or released. An id is *live* while it has references; each
    request that uses a block holds one, and so does a prefix cache that keeps a block nobody uses.
    An id released with `after_seq` is in *quarantine* until that step has retired: not live, so it
    needs no copy, but neither free.

    Thread-safe; a call that raises leaves the allocator as it was.

    Args:
        max_blocks: ids are below this for ever; at most 2**31 - 1.
        capacity: ids are below this until it changes; the null block counts.

    Raises:
        InvalidArgumentError: an argument is out of range.
        OutOfMemoryError: there is no memory for the bookkeeping (24 bytes an id).
    """

    __slots__ = ("_core",)

    def __init__(self, max_blocks: int, capacity: int) -> None:
        self._core = _core.BlockAllocator(max_blocks, capacity)

    def allocate(self, count: int) -> list[int]:
        """Return the `count` lowest free ids, ascending, with one reference each.

        Raises:
            OverBudgetError: fewer are free; the message has the counts.
            InvalidArgumentError: `count` is negative.
        """
        ids: list[int] = self._core.allocate(count)
        return ids

    def share(self, ids: Integers) -> None:
        """Add a reference to each of the live ids; an id listed twice gets two.

        Raises:
            InvalidArgumentError: an id (named) is not live or is the null block.
        """
        self._core.share(ids)

    def release(self, ids: Integers, after_seq: int | None = None) -> None:
        """Drop one reference to each of the live ids; an id listed twice loses two.

        An id that loses its last is free at once or, with `after_seq` (the last step that was
        scheduled while it was live), when that step has retired.

        Raises:
            InvalidArgumentError: an id (named) has no reference left or is the null block.
        """
        self._core.release(ids, after_seq)

    def retire(self, seq: int) -> None:
        """Say that every step up to `seq` has retired; lower numbers than before change nothing."""
        self._core.retire(seq)

    def writable(self, block: int) -> tuple[int, int | None]:
        """Return the block that the holder of `block` may write to: copy on write.

        Returns:
            (block, None) where the caller's is the only reference; otherwise a new id, to which the
            caller's reference passes, and the id whose bytes must be copied to it first.

        Raises:
            OverBudgetError: a new id is needed and none is free.
            InvalidArgumentError: `block` is not live or is the null block.
        """
        writable: tuple[int, int | None] = self._core.writable(block)
        return writable

    def generation(self, block: int) -> int:
        """Return how often the id was handed out, as a new block or as the target of a move.

        Raises:
            InvalidArgumentError: the id is not below `max_blocks`.
        """
        value: int = self._core.generation(block)
        return value

    def refcount(self, block: int) -> int:
        """Return the references to the id, 1 for the null block; raises as `generation` does."""
        value: int = self._core.refcount(block)
        return value

    def live(self) -> list[int]:
        """Return the ids with references, ascending, the null block first."""
        ids: list[int] = self._core.live()
        return ids

    def quarantined(self) -> list[int]:
        """Return the ids in quarantine, ascending."""
        ids: list[int] = self._core.quarantined()
        return ids

    def raise_capacity(self, capacity: int) -> None:
        """Make the ids below `capacity` available.

        Raises:
            InvalidArgumentError: `capacity` is below the present one or above `max_blocks`.
            BusyError: a shrink is planned.
        """
        self._core.raise_capacity(capacity)

    def plan_shrink(self, capacity: int) -> dict[int, int]:
        """Plan a shrink and return the moves, old id to new id, that it needs.

        The live ids that are too high, ascending, move to the lowest free ids, ascending. Until
        `apply_shrink` or `cancel_shrink`, neither ids from `capacity` on nor the targets of moves
        are handed out. Replaces a plan made before; planning the same capacity again succeeds.

        Raises:
            OverBudgetError: the live ids do not fit beside those in quarantine below `capacity`;
                the message has the counts. An earlier plan stays.
            InvalidArgumentError: `capacity` is below 1 or above the present one.
        """
        moves: dict[int, int] = self._core.plan_shrink(capacity)
        return moves

    def apply_shrink(
        self, capacity: int, moves: Mapping[int, int], after_seq: int | None = None
    ) -> None:
        """Carry the planned shrink out: targets take over the references of their sources.

        A block released since the plan was made does not move; its target stays free. A part of the
        plan will do, the highest ids first; what it has beyond is dropped.

        Args:
            capacity: the planned capacity, or a higher one up to the present.
            moves: the planned moves from ids at or above ``capacity``.
            after_seq: None where no step is in flight. Otherwise the last step scheduled before the
                shrink: the ids moved away are in quarantine until it has retired, and the stages
                unmap the ids only when they have completed it.

        Raises:
            InvalidArgumentError: the arguments are not what was planned.
            BusyError: an id from `capacity` on is in quarantine: any, without `after_seq`; or one
                that waits for a later step than `after_seq`.
        """
        self._core.apply_shrink(capacity, dict(moves), after_seq)

    def cancel_shrink(self) -> None:
        """Drop the planned shrink; without one, do nothing."""
        self._core.cancel_shrink()

    @property
    def num_free(self) -> int:
        """Ids that `allocate` can hand out now."""
        value: int = self._core.num_free
        return value

    @property
    def num_live(self) -> int:
        """Ids with references, the null block included."""
        value: int = self._core.num_live
        return value

    @property
    def num_quarantined(self) -> int:
        """Ids in quarantine."""
        value: int = self._core.num_quarantined
        return value

    @property
    def capacity(self) -> int:
        """Ids are below this."""
        value: int = self._core.capacity
        return value

    @property
    def max_blocks(self) -> int:
        """The most that `capacity` can be."""
        value: int = self._core.max_blocks
        return value

    @property
    def planned_capacity(self) -> int | None:
        """The capacity of the planned shrink, if one is planned."""
        value: int | None = self._core.planned_capacity
        return value

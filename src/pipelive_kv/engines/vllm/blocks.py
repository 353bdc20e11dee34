"""vLLM's block pool as the owner of block ids that our scheduler asks for."""

from __future__ import annotations

from typing import Any

from pipelive_kv.errors import OverBudgetError


class VllmBlocks:
    """A ``BlockOwner`` over vLLM's ``BlockPool``; prefix-cached blocks are live, referenced or not.

    vLLM reuses freed blocks at once, which is safe since every worker runs the steps in order: so
    there is no quarantine here. All methods but :meth:`live` and :attr:`capacity` are for the
    engine's thread.

    Args:
        pool: vLLM's block pool.
        least: the capacity that one request of the greatest length needs.
    """

    def __init__(self, pool: Any, *, least: int) -> None:
        self._pool = pool
        self._least = least

    @property
    def capacity(self) -> int:
        """Ids below this number may be handed out."""
        capacity: int = self._pool.num_gpu_blocks
        return capacity

    def live(self) -> list[int]:
        """The ids whose content matters, ascending, the null block first."""
        return sorted({0, *(b.block_id for b in list(self._pool.blocks) if self._is_live(b))})

    def count_live(self) -> int:
        """How many :meth:`live` names, for those who ask often."""
        return sum(map(self._is_live, list(self._pool.blocks)))

    def release(self, ids: list[int], after_seq: int | None = None) -> None:
        """Nothing: vLLM frees its blocks itself."""

    def retire(self, seq: int) -> None:
        """Nothing: there is no quarantine."""

    def raise_capacity(self, capacity: int) -> None:
        """Hand out ids below ``capacity``, from the step that is about to be scheduled on."""
        pool = self._pool
        if capacity <= pool.num_gpu_blocks:
            return
        block_type = type(pool.null_block)
        added = [block_type(number, pool=pool) for number in range(pool.num_gpu_blocks, capacity)]
        pool.blocks.extend(added)
        # In front: they hold nothing, while blocks further back may be cached.
        pool.free_block_queue.prepend_n(added)
        pool.num_gpu_blocks = capacity

    def plan_shrink(self, capacity: int) -> dict[int, int]:
        """The moves {old: new} that empty the ids from ``capacity`` on.

        Referenced blocks have to move; cached ones move while there is room for them, those used
        last first. Targets are free blocks, then cached blocks that nobody references.

        Raises:
            OverBudgetError: the referenced blocks do not fit, or no request would.
        """
        blocks = self._pool.blocks
        busy = [block.block_id for block in blocks if block.ref_cnt > 0 or block.is_null]
        if len(busy) > capacity:
            raise OverBudgetError(
                f"{len(busy)} blocks are in use and {capacity} would be left; busy above are "
                f"{[block for block in busy if block >= capacity]}"
            )
        if capacity < self._least:
            raise OverBudgetError(
                f"{capacity} blocks would be left, and one request of max_model_len needs "
                f"{self._least}"
            )
        oldest_first = [b for b in self._free_in_order() if self._is_live(b)]
        moving = [blocks[number] for number in busy if number >= capacity]
        moving += [b for b in reversed(oldest_first) if b.block_id >= capacity]
        targets = [b.block_id for b in blocks[:capacity] if not self._is_live(b)]
        evictable = [b.block_id for b in oldest_first if b.block_id < capacity]
        must = sum(block.ref_cnt > 0 for block in moving)
        targets += evictable[: max(0, must - len(targets))]
        return {b.block_id: new for b, new in zip(moving, targets, strict=False)}

    def apply_shrink(
        self, capacity: int, moves: dict[int, int], after_seq: int | None = None
    ) -> None:
        """Rename the moved blocks, and take the ids from ``capacity`` on out of use."""
        pool = self._pool
        for old, new in moves.items():
            moved, replaced = pool.blocks[old], pool.blocks[new]
            pool._maybe_evict_cached_block(replaced)
            _rename(pool, moved, replaced)
        for block in pool.blocks[capacity:]:
            pool._maybe_evict_cached_block(block)
            pool.free_block_queue.remove(block)
        del pool.blocks[capacity:]
        pool.num_gpu_blocks = capacity

    def cancel_shrink(self) -> None:
        """Nothing: a plan reserves nothing."""

    def _is_live(self, block: Any) -> bool:
        return bool(block.ref_cnt > 0 or block.block_hash is not None or block.is_null)

    def _free_in_order(self) -> list[Any]:
        free: list[Any] = self._pool.free_block_queue.get_all_free_blocks()
        return free


def _rename(pool: Any, moved: Any, replaced: Any) -> None:
    """Exchange two blocks' ids: requests and the free queue hold the objects, not the ids."""
    old, new = moved.block_id, replaced.block_id
    hashes = [moved.block_hash, *pool.cached_block_hashes_by_block.pop(old, ())]
    num_tokens = moved.block_hash_num_tokens
    for key in hashes:
        if key is not None:
            pool.cached_block_hash_to_block.pop(key, old)
    moved.block_id, replaced.block_id = new, old
    pool.blocks[new], pool.blocks[old] = moved, replaced
    moved.reset_hash()
    for key in hashes:
        if key is not None:
            pool._insert_block_hash(key, moved, num_tokens=num_tokens)

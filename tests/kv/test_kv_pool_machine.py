"""A KV pool against a plain model of it, over random histories with failing device calls."""

from __future__ import annotations

from collections.abc import Callable

import hypothesis.strategies as st
import numpy as np
import numpy.typing as npt
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from pipelive_kv import _core
from pipelive_kv.errors import DeviceError, OverBudgetError
from pipelive_kv.kv import KVPool
from pipelive_kv.memory import Arena, PagePool
from pipelive_kv.spec import KVSpec

PAGE = 4096
NUM_LAYERS = 5
MAX_BLOCKS = 40
# 3 * 10 * 2 * 5 * 2 = 600 bytes a block: blocks straddle pages.
SPEC = KVSpec(3, 10, "float16", 5)
WORDS = SPEC.block_bytes // 2


def content(value: int) -> npt.NDArray[np.uint16]:
    """The bits of a block; all zeros for value 0."""
    return (np.arange(WORDS, dtype=np.uint32) * 31 * value + value).astype(np.uint16)


class PoolMachine(RuleBasedStateMachine):
    """``blocks[layer][block]`` is the value last written there, 0 for none, None for unknown."""

    @initialize(
        stack=st.integers(1, 3),
        holes=st.sampled_from(["fault", "scratch"]),
        budget_pages=st.integers(8, 30),
        capacity=st.integers(1, 5),
        prepare=st.integers(0, 2),
    )
    def open(self, stack: int, holes: str, budget_pages: int, capacity: int, prepare: int) -> None:
        self.host = _core.HostDevice()
        self.device = _core.FaultDevice(self.host)
        self.pages = PagePool(budget_pages * PAGE, page_bytes=PAGE, device=self.device)
        self.pool = KVPool(
            SPEC,
            num_layers=NUM_LAYERS,
            max_blocks=MAX_BLOCKS,
            capacity=capacity,
            page_pool=self.pages,
            stack=stack,
            holes=holes,  # type: ignore[arg-type]
        )
        if prepare:
            self.pages.prepare(prepare, timeout=30)
            # From here on the thread rests: which call of the device fails must not depend on it.
            self.pages.prepare(0)
        self.stack = stack
        self.capacity = capacity
        self.blocks: dict[int, list[int | None]] = {}
        self.live: set[int] = {0}
        self.next_value = 1
        self.weights = Arena(self.pages, budget_pages * PAGE)
        self.weight_pages = 0
        self.addresses = [self.pool.layer(n).data_ptr for n in range(NUM_LAYERS)]
        self.bits = [self.pool.layer(n).as_uint16() for n in range(NUM_LAYERS)]

    def attempt(self, action: Callable[[], None], fault: int) -> bool:
        """Whether the action took place; the ``fault``-th device call fails (0: none)."""
        self.device.fail_any(fault)
        try:
            action()
        except OverBudgetError:
            return False
        except DeviceError:
            if not fault:
                raise
            return False
        finally:
            self.device.disarm()
        return True

    def read(self, layer: int, block: int) -> npt.NDArray[np.uint16]:
        return np.ascontiguousarray(self.bits[layer][block]).reshape(-1)

    def free_ids(self, below: int) -> list[int]:
        return [block for block in range(1, below) if block not in self.live]

    @rule(data=st.data(), fault=st.integers(0, 6))
    def grow(self, data: st.DataObject, fault: int) -> None:
        capacity = data.draw(st.integers(self.capacity, MAX_BLOCKS))
        if self.attempt(lambda: self.pool.grow(capacity), fault):
            for values in self.blocks.values():
                values.extend([0] * (capacity - self.capacity))
            self.capacity = capacity

    @rule(data=st.data(), fault=st.integers(0, 8))
    def shrink(self, data: st.DataObject, fault: int) -> None:
        capacity = data.draw(st.integers(1, self.capacity))
        high = sorted(block for block in self.live if block >= capacity)
        free = self.free_ids(capacity)
        if len(high) > len(free):
            for block in high[len(free) :]:
                self.live.discard(block)
            del high[len(free) :]
        targets = data.draw(st.permutations(free))[: len(high)]
        moves = dict(zip(high, targets, strict=True))
        live = sorted(self.live)
        done = self.attempt(lambda: self.pool.shrink(capacity, live=live, moves=moves), fault)
        self.note_moves(moves, done)
        if done:
            for values in self.blocks.values():
                del values[capacity:]
            self.capacity = capacity
            self.live = {moves.get(block, block) for block in self.live}

    @rule(data=st.data(), fault=st.integers(0, 6))
    def move(self, data: st.DataObject, fault: int) -> None:
        free = self.free_ids(self.capacity)
        movable = sorted(self.live - {0})
        count = data.draw(st.integers(0, min(len(free), len(movable), 4)))
        sources = data.draw(st.permutations(movable))[:count]
        moves = dict(zip(sources, data.draw(st.permutations(free))[:count], strict=True))
        done = self.attempt(lambda: self.pool.move_blocks(moves), fault)
        self.note_moves(moves, done)
        if done:
            self.live = {moves.get(block, block) for block in self.live}

    def note_moves(self, moves: dict[int, int], done: bool) -> None:
        for values in self.blocks.values():
            for old, new in moves.items():
                # The target of a move that failed was not live; it may hold anything.
                values[new] = values[old] if done else None

    @rule(data=st.data(), fault=st.integers(0, 6))
    def add(self, data: st.DataObject, fault: int) -> None:
        layers = self.draw_stacks(data, held=False)
        if self.attempt(lambda: self.pool.add_layers(layers), fault):
            for layer in layers:
                self.blocks[layer] = [0] * self.capacity

    @rule(data=st.data(), fault=st.integers(0, 4))
    def drop(self, data: st.DataObject, fault: int) -> None:
        layers = self.draw_stacks(data, held=True)
        if self.attempt(lambda: self.pool.drop_layers(layers), fault):
            for layer in layers:
                del self.blocks[layer]

    def draw_stacks(self, data: st.DataObject, held: bool) -> list[int]:
        stacks = {n // self.stack for n in range(NUM_LAYERS) if (n in self.blocks) == held}
        chosen = data.draw(st.sets(st.sampled_from(sorted(stacks)))) if stacks else set()
        return [n for n in range(NUM_LAYERS) if n // self.stack in chosen]

    @precondition(lambda self: self.blocks)
    @rule(data=st.data())
    def write(self, data: st.DataObject) -> None:
        block = data.draw(st.integers(0, self.capacity - 1))
        layer = data.draw(st.sampled_from(sorted(self.blocks)))
        shape = self.bits[layer].shape[1:]
        self.bits[layer][block] = content(self.next_value).reshape(shape)
        self.blocks[layer][block] = self.next_value
        self.live.add(block)
        self.next_value += 1

    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        self.live -= data.draw(st.sets(st.sampled_from(sorted(self.live)))) - {0}

    @rule(data=st.data(), fault=st.integers(0, 3))
    def load_weights(self, data: st.DataObject, fault: int) -> None:
        """Another user of the pages, who leaves NaN in them."""
        count = data.draw(st.integers(0, 6))
        offset = self.weight_pages * PAGE
        if offset + count * PAGE > self.weights.reserved_bytes:
            return
        if self.attempt(lambda: self.weights.map(offset, count * PAGE), fault):
            self.weights.tensor(offset, [count * PAGE], "uint8").numpy()[:] = 0xFF
            self.weight_pages += count

    @rule()
    def drop_weights(self) -> None:
        self.weights.unmap(0, self.weight_pages * PAGE)
        self.weight_pages = 0

    @rule(fault=st.integers(0, 1))
    def trim(self, fault: int) -> None:
        self.attempt(lambda: self.pages.trim() and None, fault)

    @invariant()
    def contents_are_as_written(self) -> None:
        if not hasattr(self, "pool"):
            return
        for layer, values in self.blocks.items():
            assert len(values) == self.capacity
            for block, value in enumerate(values):
                if value is not None:
                    np.testing.assert_array_equal(self.read(layer, block), content(value))

    @invariant()
    def accounts_agree(self) -> None:
        if not hasattr(self, "pool"):
            return
        pool, pages = self.pool, self.pages.stats()
        assert pool.capacity == self.capacity
        assert pool.layers == tuple(sorted(self.blocks))
        needed = pool.bytes_needed(list(self.blocks), self.capacity)
        assert pool.stats().held_bytes == needed
        assert pages.used_bytes == needed + self.weight_pages * PAGE
        assert pages.peak_held_bytes <= pages.budget_bytes
        assert self.host.usage().page_bytes == pages.held_bytes
        assert self.host.resident_file_bytes() == pages.held_bytes
        assert [pool.layer(n).data_ptr for n in range(NUM_LAYERS)] == self.addresses
        for layer in range(NUM_LAYERS):
            expected = self.capacity if layer in self.blocks else 0
            assert pool.layer(layer).resident_blocks == expected

    def teardown(self) -> None:
        if not hasattr(self, "pool"):
            return
        self.pool.close()
        self.weights.close()
        assert self.pages.used_bytes == 0
        self.pages.close()
        usage = self.host.usage()
        assert (usage.page_bytes, usage.mapped_bytes) == (0, 0)


TestPoolMachine = PoolMachine.TestCase

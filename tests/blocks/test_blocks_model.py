"""The allocator against dictionaries."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from pipelive_kv.blocks import BlockAllocator
from pipelive_kv.errors import BusyError, InvalidArgumentError, OverBudgetError

MAX_BLOCKS = 80  # two words of the bitmap


class AllocatorMachine(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        self.blocks = BlockAllocator(MAX_BLOCKS, 20)
        self.capacity = 20
        self.references = {}  # id -> count
        self.quarantine = {}  # id -> step
        self.generations = dict.fromkeys(range(MAX_BLOCKS), 0)
        self.retired = -1
        self.plan = None  # capacity, moves

    def free(self):
        limit, targets = self.capacity, set()
        if self.plan is not None:
            limit, targets = self.plan[0], set(self.plan[1].values())
        taken = self.references.keys() | self.quarantine.keys() | targets
        return [i for i in range(1, limit) if i not in taken]

    def take(self, count):
        ids = self.free()[:count]
        for i in ids:
            self.references[i] = 1
            self.generations[i] += 1
        return ids

    def drop(self, ids, after):
        for i in ids:
            self.references[i] -= 1
            if self.references[i] == 0:
                del self.references[i]
                if after is not None and after > self.retired:
                    self.quarantine[i] = after

    @rule(count=st.integers(0, 12))
    def allocate(self, count):
        if count > len(self.free()):
            with pytest.raises(OverBudgetError, match=f"{len(self.free())} free"):
                self.blocks.allocate(count)
        else:
            assert self.blocks.allocate(count) == self.take(count)

    @precondition(lambda self: self.references)
    @rule(data=st.data())
    def share(self, data):
        ids = data.draw(st.lists(st.sampled_from(sorted(self.references)), max_size=4))
        self.blocks.share(ids)
        for i in ids:
            self.references[i] += 1

    @precondition(lambda self: self.references)
    @rule(data=st.data(), after=st.none() | st.integers(0, 30))
    def release(self, data, after):
        held = [i for i, count in sorted(self.references.items()) for _ in range(count)]
        ids = data.draw(st.permutations(held))[: data.draw(st.integers(1, 8))]
        self.blocks.release(ids, after)
        self.drop(ids, after)

    @rule(data=st.data(), after=st.none() | st.integers(0, 30))
    def release_too_much(self, data, after):
        """A bad id at the end takes the whole call back."""
        good = data.draw(
            st.lists(st.sampled_from(sorted(self.references)), unique=True)
            if self.references
            else st.just([])
        )
        bad = data.draw(
            st.sampled_from(
                [0, -1, MAX_BLOCKS, *(i for i in range(1, MAX_BLOCKS) if i not in self.references)]
            )
        )
        with pytest.raises(InvalidArgumentError, match=rf"ids\[{len(good)}\] is {bad}"):
            self.blocks.release([*good, bad], after)
        with pytest.raises(InvalidArgumentError, match=rf"ids\[{len(good)}\] is {bad}"):
            self.blocks.share([*good, bad])

    @rule(seq=st.integers(0, 30))
    def retire(self, seq):
        self.blocks.retire(seq)
        self.retired = max(self.retired, seq)
        self.quarantine = {i: s for i, s in self.quarantine.items() if s > self.retired}

    @precondition(lambda self: self.references)
    @rule(data=st.data())
    def writable(self, data):
        block = data.draw(st.sampled_from(sorted(self.references)))
        if self.references[block] == 1:
            assert self.blocks.writable(block) == (block, None)
        elif not self.free():
            with pytest.raises(OverBudgetError):
                self.blocks.writable(block)
        else:
            self.references[block] -= 1
            assert self.blocks.writable(block) == (self.take(1)[0], block)

    @rule(capacity=st.integers(1, MAX_BLOCKS))
    def raise_capacity(self, capacity):
        if capacity < self.capacity:
            with pytest.raises(InvalidArgumentError):
                self.blocks.raise_capacity(capacity)
        elif self.plan is not None:
            with pytest.raises(BusyError):
                self.blocks.raise_capacity(capacity)
        else:
            self.blocks.raise_capacity(capacity)
            self.capacity = capacity

    @rule(data=st.data())
    def plan_shrink(self, data):
        capacity = data.draw(st.integers(1, self.capacity))
        taken = self.references.keys() | self.quarantine.keys()
        low = [i for i in range(1, capacity) if i not in taken]
        high = [i for i in sorted(self.references) if i >= capacity]
        if len(high) > len(low):
            with pytest.raises(OverBudgetError, match=f"{len(self.references) + 1} live"):
                self.blocks.plan_shrink(capacity)
        else:
            moves = dict(zip(high, low, strict=False))
            assert self.blocks.plan_shrink(capacity) == moves
            self.plan = (capacity, moves)

    @rule()
    def cancel_shrink(self):
        self.blocks.cancel_shrink()
        self.plan = None

    @precondition(lambda self: self.plan is not None)
    @rule(after=st.none() | st.integers(0, 30))
    def apply_shrink(self, after):
        capacity, moves = self.plan
        wrong = {**moves, 0: 0}
        with pytest.raises(InvalidArgumentError):
            self.blocks.apply_shrink(capacity, wrong, after)
        high = [s for i, s in self.quarantine.items() if capacity <= i < self.capacity]
        if high and (after is None or max(high) > after):
            with pytest.raises(BusyError, match="in quarantine until step"):
                self.blocks.apply_shrink(capacity, moves, after)
            return
        self.blocks.apply_shrink(capacity, moves, after)
        self.plan = None
        self.capacity = capacity
        for old, new in moves.items():
            if old in self.references:
                self.references[new] = self.references.pop(old)
                self.generations[new] += 1
                if after is not None and after > self.retired:
                    self.quarantine[old] = after

    @invariant()
    def agrees_with_the_model(self):
        blocks = self.blocks
        assert blocks.live() == [0, *sorted(self.references)]
        assert blocks.quarantined() == sorted(self.quarantine)
        assert blocks.num_free == len(self.free())
        assert blocks.num_live == len(self.references) + 1
        assert blocks.num_quarantined == len(self.quarantine)
        assert blocks.capacity == self.capacity
        assert blocks.planned_capacity == (self.plan[0] if self.plan is not None else None)
        for i in range(1, MAX_BLOCKS):
            assert blocks.refcount(i) == self.references.get(i, 0)
            assert blocks.generation(i) == self.generations[i]


TestAllocator = AllocatorMachine.TestCase
TestAllocator.settings = settings(max_examples=60, stateful_step_count=50, deadline=None)

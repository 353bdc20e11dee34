"""Capacity changes take effect between two steps, in the order of the stamps, and nowhere else."""

import random
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import pipelive_kv as pk
from pipelive_kv.messages import DescribeScheduler, RaiseCapacity, Settle, Shrink

MAX_BLOCKS = 32


class World:
    """A scheduler, asked as a coordinator would ask it, and stages that lag behind."""

    def __init__(self, capacity=16, moves_per_step=64):
        self.allocator = pk.BlockAllocator(MAX_BLOCKS, capacity)
        self.scheduler = pk.Scheduler(
            pk.Placement.from_counts([2]), allocator=self.allocator, moves_per_step=moves_per_step
        )
        self.scheduler.on_remap(self._remap)
        self.wanted = threading.Event()
        self.scheduler.on_wants_step(self.wanted.set)
        self.held: list[list[int]] = []
        self.values: list[list[int]] = []
        self.asked: threading.Thread | None = None
        self.outcome: object = None
        self.epoch = 0

    def _remap(self, moves):
        self.held = [[moves.get(block, block) for block in blocks] for blocks in self.held]

    def shrink(self, capacity, timeout=60.0):
        """Ask for a shrink; returns once it waits for a step, or is answered."""
        self.epoch += 1
        self.wanted.clear()

        def ask():
            try:
                self.outcome = self.scheduler._handle(Shrink(self.epoch, capacity, timeout))
            except pk.PipeliveError as error:
                self.outcome = error
            self.wanted.set()

        self.asked = threading.Thread(target=ask)
        self.asked.start()
        assert self.wanted.wait(60)

    def answer(self):
        self.asked.join(60)
        return self.outcome

    def take(self, count):
        self.held.append(self.allocator.allocate(count))
        self.values.append([0] * count)

    def free(self):
        if self.held:
            self.values.pop(0)
            self.scheduler.freed(self.held.pop(0))

    def close(self):
        self.scheduler.close()
        if self.asked is not None:
            self.asked.join(60)


@pytest.fixture
def world():
    made = World()
    yield made
    made.close()


def test_a_higher_capacity_comes_with_a_step(world):
    seen = []
    world.scheduler.on_capacity(seen.append)
    assert world.scheduler.stamp().capacity == 16
    world.scheduler._handle(RaiseCapacity(24))
    assert world.wanted.is_set()
    assert world.scheduler.wants_step
    assert (world.allocator.capacity, seen) == (16, [])
    assert world.scheduler.stamp().capacity == 24
    assert (world.allocator.capacity, seen) == (24, [24])
    assert not world.scheduler.wants_step
    world.shrink(20)
    assert world.scheduler.stamp().capacity == 20
    assert world.answer().capacity == 20
    assert world.scheduler.stamp().capacity == 20  # what was raised before is not raised again


def test_raised_and_lowered_before_one_step(world):
    world.scheduler._handle(RaiseCapacity(24))
    world.shrink(20)
    stamp = world.scheduler.stamp()
    assert (stamp.capacity, stamp.resize) == (20, 1)
    assert world.scheduler._handle(RaiseCapacity(24))
    assert world.scheduler.stamp().capacity == 24


def test_a_shrink_waits_for_the_quarantine(world):
    world.take(7)
    world.take(6)
    first = world.scheduler.stamp()
    world.free()  # 7 ids below the new capacity that step 0 may still write to
    world.shrink(9)
    assert world.scheduler.stamp().capacity == 16
    assert world.outcome is None
    world.scheduler.retired(first.seq + 1)
    stamp = world.scheduler.stamp()
    assert stamp.capacity == 9
    assert len(stamp.moves) == 5
    assert world.answer().moved == 5


def test_many_moves_are_spread_over_steps():
    world = World(moves_per_step=2)
    try:
        world.take(7)
        world.take(6)
        before = dict(enumerate(world.held[1]))
        first = world.scheduler.stamp()
        world.free()
        world.scheduler.retired(first.seq)
        world.shrink(9)
        steps = [world.scheduler.stamp() for _ in range(3)]
        assert [(s.capacity, s.resize, len(s.moves)) for s in steps] == [
            (12, 1, 2),
            (10, 2, 2),
            (9, 3, 1),
        ]
        assert not world.scheduler.wants_step
        answer = world.answer()
        assert (answer.capacity, answer.resize, answer.moved) == (9, 3, 5)
        moved = {old: new for step in steps for old, new in step.moves}
        assert world.held[0] == [moved.get(block, block) for block in before.values()]
    finally:
        world.close()


def test_a_shrink_that_ends_half_way_says_so_and_can_be_taken_back():
    world = World(moves_per_step=2)
    try:
        world.take(7)
        world.take(6)
        world.free()
        world.shrink(9)
        assert world.scheduler.stamp().capacity == 12
        assert world.outcome is None
        world.scheduler._handle(Settle(world.epoch, commit=False))
        assert isinstance(world.answer(), pk.CancelledError)
        assert world.scheduler.stamp().capacity == 12
        found = world.scheduler._handle(DescribeScheduler())
        assert (found.capacity, found.capacity_before, found.resize) == (12, 16, 1)
        world.scheduler._handle(RaiseCapacity(16))
        assert world.scheduler.stamp().capacity == 16
    finally:
        world.close()


def test_moves_per_step_is_checked():
    with pytest.raises(pk.InvalidArgumentError, match="moves_per_step is 0, expected 1 or more"):
        World(moves_per_step=0)


def test_live_blocks_that_do_not_fit_are_refused(world):
    world.take(12)
    world.shrink(9)
    assert world.scheduler.stamp().capacity == 16
    assert isinstance(world.answer(), pk.OverBudgetError)
    assert "13 live blocks" in str(world.outcome)
    assert world.scheduler.wanted_capacity is None


def test_the_engine_makes_room(world):
    lacking = []

    def free_one(count):
        lacking.append((count, world.scheduler.wanted_capacity))
        world.free()

    world.scheduler.on_short(free_one)
    for _ in range(6):
        world.take(2)
    stamp = world.scheduler.stamp()
    world.shrink(9)
    assert world.scheduler.stamp().capacity == 16  # what was freed is in quarantine
    assert lacking == [(4, 9), (2, 9)]
    world.scheduler.retired(stamp.seq + 1)
    assert world.scheduler.stamp().capacity == 9
    assert world.answer().capacity == 9


def test_an_engine_that_frees_nothing_is_asked_once(world):
    lacking = []
    world.scheduler.on_short(lacking.append)
    world.take(12)
    world.shrink(9)
    world.scheduler.stamp()
    assert isinstance(world.answer(), pk.OverBudgetError)
    assert lacking == [4]


def _stage(memory, stamp, applied):
    """What a stage does before a step: the moves of a resize that it has not made."""
    if stamp.resize != applied:
        assert stamp.resize == applied + 1
        moved = {new: memory.get(old, 0) for old, new in stamp.moves}
        memory.update(moved)
        for block in range(stamp.capacity, MAX_BLOCKS):
            memory.pop(block, None)
    return stamp.resize


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32))
def test_content_survives_every_order_of_changes(seed):
    """Stages run steps late; blocks are freed, reused, moved, and the capacity goes both ways."""
    dice = random.Random(seed)
    world = World(moves_per_step=dice.choice([1, 2, 64]))
    world.scheduler.on_short(lambda _: world.free())
    memory = {0: 0}
    queue = []
    applied, token = 0, 1

    def run_one():
        nonlocal applied
        stamp, reads, writes = queue.pop(0)
        applied = _stage(memory, stamp, applied)
        for block, expected in reads:
            assert memory[block] == expected, (stamp, block)
        for block, value in writes:
            assert block < stamp.capacity
            memory[block] = value
        world.scheduler.retired(stamp.seq)

    try:
        for _ in range(60):
            present = world.scheduler._residency.capacity
            if world.asked is None or not world.asked.is_alive():
                if dice.random() < 0.3:
                    world.shrink(dice.randint(2, present))
                elif dice.random() < 0.3:
                    world.scheduler._handle(RaiseCapacity(dice.randint(present, MAX_BLOCKS)))
            if world.held and dice.random() < 0.3:
                world.free()
            stamp = world.scheduler.stamp()
            assert stamp.capacity == world.allocator.capacity
            if dice.random() < 0.6 and world.scheduler.wanted_capacity is None:
                world.take(dice.randint(0, min(4, world.allocator.num_free)))
            reads, writes = [], []
            for blocks, values in zip(world.held, world.values, strict=True):
                for index, block in enumerate(blocks):
                    if values[index]:
                        reads.append((block, values[index]))
                    if dice.random() < 0.4:
                        values[index] = token
                        writes.append((block, token))
                        token += 1
            queue.append((stamp, reads, writes))
            while len(queue) > dice.randint(0, 3):
                run_one()
        while queue:
            run_one()
    finally:
        world.close()

"""What steps hold, without processes or a model."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelive_kv.blocks import BlockAllocator
from pipelive_kv.engines.reference import EngineConfig, Request
from pipelive_kv.engines.reference.batcher import Batcher
from pipelive_kv.errors import InvalidArgumentError
from pipelive_kv.messages import Stamp
from pipelive_kv.placement import Placement

CHUNK, BATCH, BLOCK, END = 5, 3, 4, 99
PLACEMENT = Placement.from_counts([1])


class Driver:
    """A scheduler and a model in one: token n of a request is 100 * its id + n."""

    def __init__(self, *, lanes: int = 2, capacity: int = 40) -> None:
        config = EngineConfig(
            "none",
            PLACEMENT,
            block_size=BLOCK,
            max_blocks=capacity,
            lanes=lanes,
            max_batch=BATCH,
            chunk=CHUNK,
            max_tokens=60,
        )
        self.lanes = lanes
        self.allocator = BlockAllocator(capacity, capacity)
        self.batcher = Batcher(config, self.allocator, eos=[END])
        self.seq = 0
        self.written: dict[int, tuple[int, int]] = {}  # slot -> (request, position)
        self.kinds = ""
        self.outputs: dict[int, list[int]] = {}

    def step(self) -> None:
        assert not self.batcher.is_busy(self.seq)
        step, _ = self.batcher.build(Stamp(self.seq, 0, capacity=self.allocator.capacity))
        self.kinds += step.kind[0]
        size = {"prefill": CHUNK, "decode": BATCH, "empty": 0}[step.kind]
        assert len(step.tokens) == len(step.positions) == len(step.slots) == size
        assert not step.query_start or step.query_start[-1] == size
        lane = self.batcher._lanes[self.seq % self.lanes]
        for slot in step.slots:
            if slot >= 0:
                assert slot // BLOCK in self.allocator.live()
                assert slot >= BLOCK  # never the null block
        assert len({slot for slot in step.slots if slot >= 0}) == sum(s >= 0 for s in step.slots)
        tokens = [100 * s.request_id + len(s.output) for s in lane.in_flight[self.seq]]
        for sequence, token in self.batcher.finish(self.seq, tokens):
            self.outputs.setdefault(sequence.request_id, []).append(token)
            if self.batcher.end_of(sequence):
                self.allocator.release(self.batcher.remove(sequence), self.seq)
        self.allocator.retire(self.seq)
        self.seq += 1


@settings(max_examples=60)
@given(
    requests=st.lists(
        st.tuples(st.integers(1, 17), st.integers(1, 9), st.integers(0, 30)), min_size=1, max_size=9
    ),
    lanes=st.integers(1, 3),
    capacity=st.integers(8, 40),
)
def test_every_request_is_served_in_fixed_shapes(requests, lanes, capacity):
    driver = Driver(lanes=lanes, capacity=capacity)
    for number, (prompt, new, arrival) in enumerate(requests):
        request = Request(tuple(range(10, 10 + prompt)), new, arrival_step=arrival)
        driver.batcher.add(number, request)
    while not driver.batcher.is_idle:
        driver.step()
        assert driver.seq < 2000
    for number, (_, new, _) in enumerate(requests):
        assert driver.outputs[number] == [100 * number + at for at in range(new)]
    assert driver.allocator.live() == [0]


@settings(max_examples=60)
@given(
    requests=st.lists(
        st.tuples(st.integers(1, 17), st.integers(1, 9)), min_size=1, max_size=9, unique=True
    ),
    lanes=st.integers(1, 3),
    cuts=st.sets(st.integers(0, 60), max_size=6),
)
def test_preempted_requests_run_the_same_tokens_again(requests, lanes, cuts):
    """The tokens that a request's steps run, by position, and its row: each time the same."""
    driver = Driver(lanes=lanes, capacity=24)
    for number, (prompt, new) in enumerate(requests):
        driver.batcher.add(number, Request(tuple(range(10, 10 + prompt)), new))
    rows: dict[int, int] = {}
    while not driver.batcher.is_idle:
        driver.step()
        for lane in driver.batcher._lanes:
            for row, sequence in enumerate(lane.rows):
                if sequence is not None:
                    assert rows.setdefault(sequence.request_id, row) == row
        if driver.seq in cuts:
            live = driver.allocator.num_live
            found = driver.batcher.preempt(5, 24)
            assert len(found) >= min(5, live - 1)
            driver.allocator.release(found)
        assert driver.seq < 2000
    for number, (_, new) in enumerate(requests):
        assert driver.outputs[number] == [100 * number + at for at in range(new)]
    assert driver.allocator.live() == [0]


def test_a_preempted_request_is_fed_what_it_has_drawn():
    driver = Driver(lanes=1)
    driver.batcher.add(3, Request((1, 2), 4))
    fed = []
    for seq in range(12):
        step, _ = driver.batcher.build(Stamp(seq, 0))
        fed += [
            (p, t)
            for p, t, s in zip(step.positions, step.tokens, step.slots, strict=True)
            if s >= 0
        ]
        tokens = [300 + len(s.output) for s in driver.batcher._lanes[0].in_flight[seq]]
        assert len(step.samples) == len(tokens)
        driver.batcher.finish(seq, tokens)
        if seq == 2:
            driver.allocator.release(driver.batcher.preempt(1, 40))
        if any(driver.batcher.end_of(s) for s in driver.batcher._lanes[0].rows if s):
            break
    first = [(0, 1), (1, 2), (2, 300), (3, 301)]
    assert fed == [*first, *first, (4, 302)]


def test_a_request_that_would_not_fit_is_left_alone():
    driver = Driver(lanes=1)
    driver.batcher.add(0, Request(tuple(range(20)), 4))
    driver.step()
    assert driver.batcher.preempt(1, 6) == []
    assert len(driver.batcher.preempt(1, 7)) == 6
    assert driver.batcher.preempted == 1


def test_no_request_is_admitted_beyond_a_shrink():
    driver = Driver(lanes=1)
    driver.batcher.add(0, Request((1,) * 8, 4))  # 3 blocks
    _, admitted = driver.batcher.build(Stamp(0, 0), 3)
    assert admitted == []
    driver.batcher.finish(0, [])
    _, admitted = driver.batcher.build(Stamp(1, 0), 4)
    assert admitted == [0]


def test_prompts_and_decodes_take_turns():
    driver = Driver(lanes=1)
    driver.batcher.add(0, Request((1, 2), 6))
    driver.batcher.add(1, Request(tuple(range(22)), 2))
    while not driver.batcher.is_idle:
        driver.step()
    assert driver.kinds == "pd" * 6


def test_arrival_step_is_respected():
    driver = Driver(lanes=2)
    driver.batcher.add(0, Request((1,), 1, arrival_step=4))
    while not driver.batcher.is_idle:
        driver.step()
    assert driver.kinds == "eeeep"


def test_end_token_ends_a_text():
    driver = Driver()
    driver.batcher.add(0, Request((1,), 5))
    driver.batcher.build(Stamp(0, 0))
    ((sequence, _),) = driver.batcher.finish(0, [END])
    assert driver.batcher.end_of(sequence) == "eos"
    sequence.output[-1] = 0
    assert driver.batcher.end_of(sequence) == ""


def test_moved_blocks_are_followed():
    driver = Driver(lanes=1)
    driver.batcher.add(0, Request(tuple(range(CHUNK + 1)), 2))
    step, _ = driver.batcher.build(Stamp(0, 0))
    old = step.slots[0] // BLOCK
    driver.batcher.finish(0, [])
    driver.batcher.remap({old: 30})
    step, _ = driver.batcher.build(Stamp(1, 0))
    assert step.block_tables[0][0] == 30


@pytest.mark.parametrize(
    ("request_", "reason"),
    [
        (Request((), 1), "needs a prompt"),
        (Request((1,), 0), "at least one new token"),
        (Request((1,) * 60, 1), "max_tokens is 60"),
        (Request((1,) * 30, 8), "takes 10 blocks; there are 7"),
    ],
)
def test_impossible_requests_are_refused(request_, reason):
    driver = Driver(capacity=8)
    with pytest.raises(InvalidArgumentError, match=reason):
        driver.batcher.add(0, request_)


def test_wrong_number_of_tokens_is_refused():
    driver = Driver()
    driver.batcher.add(0, Request((1,), 1))
    driver.batcher.build(Stamp(0, 0))
    with pytest.raises(InvalidArgumentError, match="drew 2 tokens; expected 1"):
        driver.batcher.finish(0, [1, 2])

"""Whatever order patches arrive in, the target ends with the source's bytes.

A real sender's messages are taken off its channel, and are put on the receiver's in another order,
some of them twice. Writers go on meanwhile, blocks are freed and reused.
"""

from __future__ import annotations

import time

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from migration_cases import (
    BLOCKS,
    LAYERS,
    SECONDS,
    SPEC,
    Running,
    channels,
    kind_of,
    make_pool,
    ranges,
    read_slot,
    views,
    write_slot,
)

from pipelive_kv.blocks import BlockAllocator
from pipelive_kv.errors import PipeliveError
from pipelive_kv.migration import PatchReceiver, PatchSender
from pipelive_kv.spec import KVSpec
from pipelive_kv.tracker import DirtyTracker

EPOCH = 3


class Patches(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        self.source = make_pool()
        self.target = make_pool(KVSpec(2, 8, block_size=4, order="nhd"), stack=1)
        near, self.near_end = channels()
        self.far_end, far = channels()
        # Messages of about three slots, so that a round has several.
        self.sender = PatchSender(
            near, SPEC, views(self.source), epoch=EPOCH, max_message_bytes=400, checksum=True
        )
        self.receiver = PatchReceiver(far, SPEC, views(self.target), epoch=EPOCH)
        self.running = Running(self.receiver)
        self.tracker = DirtyTracker(BLOCKS * SPEC.block_size)
        self.allocator = BlockAllocator(BLOCKS, BLOCKS)
        self.held: list[int] = []
        self.open: list[int] = []
        self.next_seq = 0
        self.next_value = 1
        self.round = 0
        self.last_write: dict[int, int] = {}
        self.waiting: list[bytes] = []
        self.delivered = 0
        # What is there before the migration begins goes over as the bulk.
        self.held = self.allocator.allocate(5)
        for block in self.held:
            for slot in range(block * 4, block * 4 + 4):
                self._write(slot, -1)
        self._send_round(-1, ranges(*((block * 4, 4) for block in self.held)))

    # -- writers -----------------------------------------------------------------------------------

    def _write(self, slot, seq):
        for layer in LAYERS:
            write_slot(self.source, layer, slot, self.next_value % 65521 + layer)
        self.next_value += 1
        self.last_write[slot] = seq

    @precondition(lambda self: self.held and len(self.open) < 4)
    @rule(data=st.data())
    def step_writes(self, data):
        """A step logs its slots, writes them, and is open until it is sealed."""
        seq = self.next_seq
        self.next_seq += 1
        blocks = data.draw(st.lists(st.sampled_from(self.held), max_size=3, unique=True))
        slots = [
            block * 4 + token
            for block in blocks
            for token in data.draw(st.lists(st.integers(0, 3), max_size=3, unique=True))
        ]
        self.tracker.open(seq)
        self.tracker.record(seq, np.array(slots, dtype=np.int64))
        for slot in slots:
            self._write(slot, seq)
        self.open.append(seq)

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def step_completes(self, data):
        seq = data.draw(st.sampled_from(self.open))
        self.open.remove(seq)
        self.tracker.seal(seq)

    @rule(count=st.integers(1, 3))
    def blocks_are_allocated(self, count):
        if self.allocator.num_free >= count:
            self.held += self.allocator.allocate(count)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def blocks_are_freed(self, data):
        """And may be handed out again before the next round."""
        block = data.draw(st.sampled_from(self.held))
        self.held.remove(block)
        self.allocator.release([block])

    # -- the patch thread --------------------------------------------------------------------------

    def _send_round(self, through, patch):
        self.sender.send_round(self.round, through, patch, timeout=SECONDS)
        self.round += 1
        while True:
            message = self.near_end.receive(SECONDS)
            if kind_of(message) == "hello":
                self._deliver(message)
                continue
            self.waiting.append(message)
            if kind_of(message) == "round_end":
                return

    @precondition(lambda self: len(self.waiting) < 60)
    @rule()
    def round_is_sent(self):
        collected = self.tracker.collect()
        self._send_round(collected.through_seq, collected.ranges)

    # -- the network -------------------------------------------------------------------------------

    def _deliver(self, message):
        self.far_end.send(message, SECONDS)
        self.delivered += 1

    @precondition(lambda self: self.waiting)
    @rule(data=st.data(), again=st.booleans())
    def message_arrives(self, data, again):
        place = data.draw(st.integers(0, len(self.waiting) - 1))
        self._deliver(self.waiting[place] if again else self.waiting.pop(place))

    @precondition(lambda self: len(self.waiting) > 1)
    @rule(seed=st.integers(0, 2**16))
    def everything_arrives_shuffled(self, seed):
        order = np.random.default_rng(seed).permutation(len(self.waiting))
        for place in order:
            self._deliver(self.waiting[place])
        self.waiting.clear()

    def _settle(self):
        """Wait until the receiver has dealt with everything that was delivered."""
        end = time.monotonic() + SECONDS
        while self.receiver.stats().messages < self.delivered:
            assert self.running.error is None, self.running.error
            assert time.monotonic() < end
            time.sleep(1e-4)

    # -- what must hold ----------------------------------------------------------------------------

    @invariant()
    def applied_means_applied(self):
        """All that was last written by a step up to applied_through is at the target."""
        self._settle()
        through = self.receiver.applied_through
        complete = self.receiver.stats().rounds > 0
        for slot, seq in self.last_write.items():
            if complete and seq <= through:
                for layer in LAYERS:
                    near = read_slot(self.source, layer, slot)
                    far = read_slot(self.target, layer, slot)
                    assert (near == far).all(), f"layer {layer} slot {slot} of step {seq}"

    def teardown(self):
        try:
            for seq in self.open:
                self.tracker.seal(seq)
            self.round_is_sent()
            for message in self.waiting:
                self._deliver(message)
            self._settle()
            assert self.receiver.applied_through == self.next_seq - 1
            for layer in LAYERS:
                for slot in self.last_write:
                    near = read_slot(self.source, layer, slot)
                    assert (near == read_slot(self.target, layer, slot)).all(), (layer, slot)
        finally:
            self.running.__exit__()
            self.sender.cancel()
            self.source.close()
            self.target.close()
        assert self.running.error is None or isinstance(self.running.error, PipeliveError)


TestPatches = Patches.TestCase
TestPatches.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)

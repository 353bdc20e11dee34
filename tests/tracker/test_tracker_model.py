"""The tracker against sets of slots, also with several threads writing at once."""

import threading

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from pipelive_kv.tracker import DirtyTracker

NUM_SLOTS = 200  # a little more than three words of the bitmap
BLOCK_SIZE = 16

slots = st.lists(st.integers(-1, NUM_SLOTS - 1), max_size=12)
blocks = st.lists(st.integers(0, NUM_SLOTS // BLOCK_SIZE - 1), max_size=3)


def slots_of(ranges):
    return {slot for begin, count in ranges.tolist() for slot in range(begin, begin + count)}


def is_normal(ranges):
    begins, ends = ranges[:, 0], ranges[:, 0] + ranges[:, 1]
    return bool((ranges[:, 1] > 0).all() and (begins[1:] > ends[:-1]).all())


class TrackerMachine(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        self.tracker = DirtyTracker(NUM_SLOTS)
        self.first = 0  # the first step that was not collected
        self.steps = []  # [slots, sealed] of the steps from `first` on
        self.hold = None
        self.externals = {}  # token -> [slots, recorded under a hold, sealed]
        self.sealed_externals = set()
        self.generation = 0

    @property
    def open_seqs(self):
        return [self.first + i for i, (_, sealed) in enumerate(self.steps) if not sealed]

    def prefix(self):
        """How many steps a collect would take, and the slots it would give."""
        length, written = 0, set(self.sealed_externals)
        for seq, (step, sealed) in enumerate(self.steps, self.first):
            if not sealed or (self.hold is not None and seq >= self.hold):
                break
            length += 1
            written |= step
        return length, written

    @rule()
    def open(self):
        self.tracker.open(self.first + len(self.steps))
        self.steps.append([set(), False])

    @precondition(lambda self: self.open_seqs)
    @rule(data=st.data(), slots=slots, ids=blocks)
    def record(self, data, slots, ids):
        seq = data.draw(st.sampled_from(self.open_seqs))
        self.tracker.record(seq, np.array(slots, dtype=np.int64))
        self.tracker.record_blocks(seq, ids, BLOCK_SIZE)
        step = self.steps[seq - self.first][0]
        step |= set(slots) - {-1}
        step |= {block * BLOCK_SIZE + i for block in ids for i in range(BLOCK_SIZE)}

    @precondition(lambda self: self.open_seqs)
    @rule(data=st.data())
    def seal(self, data):
        seq = data.draw(st.sampled_from(self.open_seqs))
        self.tracker.seal(seq)
        self.steps[seq - self.first][1] = True

    @rule(slots=slots)
    def record_external(self, slots):
        token = self.tracker.record_external(slots)
        self.externals[token] = [set(slots) - {-1}, self.hold is not None, False]

    @precondition(lambda self: any(not sealed for _, _, sealed in self.externals.values()))
    @rule(data=st.data())
    def seal_external(self, data):
        token = data.draw(st.sampled_from([t for t, e in self.externals.items() if not e[2]]))
        self.tracker.seal_external(token)
        self.externals[token][2] = True
        self.settle_externals()

    def settle_externals(self):
        for token, (written, held, sealed) in list(self.externals.items()):
            if sealed and not held:
                self.sealed_externals |= written
                del self.externals[token]

    @precondition(lambda self: self.hold is None)
    @rule(ahead=st.integers(0, 3))
    def hold_from(self, ahead):
        self.hold = self.first + self.prefix()[0] + ahead
        self.tracker.hold_from(self.hold)

    @rule()
    def release_hold(self):
        self.tracker.release_hold()
        self.hold = None
        for external in self.externals.values():
            external[1] = False
        self.settle_externals()

    @rule(lose=st.booleans())
    def collect(self, lose):
        length, written = self.prefix()
        collected = self.tracker.collect()
        assert slots_of(collected.ranges) == written
        assert is_normal(collected.ranges)
        assert collected.num_slots == len(written)
        assert collected.through_seq == self.first + length - 1
        assert collected.generation > self.generation
        assert collected.open_externals == sum(not held for _, held, _ in self.externals.values())
        self.generation = collected.generation
        self.first += length
        del self.steps[:length]
        self.sealed_externals.clear()
        if lose:  # the round was not sent
            self.tracker.restore(collected.ranges)
            self.sealed_externals |= written

    @rule(ahead=st.integers(0, 5))
    def reset(self, ahead):
        self.first += len(self.steps) + ahead
        self.tracker.reset(self.first)
        self.steps.clear()
        self.externals.clear()
        self.sealed_externals.clear()
        self.hold = None

    @precondition(lambda self: len(self.open_seqs) > 1)
    @rule(work=st.lists(st.tuples(st.integers(0, 9), slots), min_size=6, max_size=24))
    def record_from_threads(self, work):
        """Three threads write to open steps, and seal the first, while another collects."""
        open_seqs = self.open_seqs
        sealed, targets = open_seqs[0], open_seqs[1:]
        before = self.prefix()[1]
        start = threading.Barrier(4)
        collected = []

        def write(part):
            start.wait()
            for choice, slots in part:
                self.tracker.record(targets[choice % len(targets)], slots)

        def seal_and_collect():
            start.wait()
            collected.append(self.tracker.collect())
            self.tracker.seal(sealed)
            collected.append(self.tracker.collect())

        threads = [threading.Thread(target=write, args=(work[i::3],)) for i in range(3)]
        threads.append(threading.Thread(target=seal_and_collect))
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

        for choice, slots in work:
            self.steps[targets[choice % len(targets)] - self.first][0] |= set(slots) - {-1}
        self.steps[sealed - self.first][1] = True
        length, written = self.prefix()
        assert slots_of(collected[0].ranges) == before
        assert before | slots_of(collected[1].ranges) == written
        assert collected[1].through_seq == self.first + length - 1
        self.generation = collected[1].generation
        self.first += length
        del self.steps[:length]
        self.sealed_externals.clear()

    @invariant()
    def counters_agree(self):
        length = 0
        for _, sealed in self.steps:
            if not sealed:
                break
            length += 1
        assert self.tracker.pending_slots == len(self.prefix()[1])
        assert self.tracker.next_seq == self.first + len(self.steps)
        assert self.tracker.sealed_through == self.first + length - 1
        assert self.tracker.open_steps == len(self.open_seqs)
        assert self.tracker.open_externals == sum(not e[2] for e in self.externals.values())


TestTracker = TrackerMachine.TestCase
TestTracker.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)

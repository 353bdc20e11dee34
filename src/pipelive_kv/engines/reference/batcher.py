"""Who runs in which step: lanes of rows, chunked prefill, fixed shapes.

What a step holds depends on the step's number and on earlier results alone, never on the clock, and
its shapes are fixed: a decode step has `max_batch` rows, a prefill step `chunk` tokens, whatever is
in them. So a request's tokens come out bit for bit the same in every run that admits it in the same
row.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from pipelive_kv.blocks import BlockAllocator
from pipelive_kv.engines.reference.config import EngineConfig, Request
from pipelive_kv.engines.reference.messages import Sample, Step
from pipelive_kv.errors import InvalidArgumentError
from pipelive_kv.messages import Stamp

__all__ = ["Batcher", "Sequence"]


@dataclass
class Sequence:
    """A request that has been submitted.

    Attributes:
        blocks: its block ids; all it can ever need are taken when it is admitted.
        cached: tokens whose KV is in the cache or on its way there.
        output: tokens drawn so far.
        row: of its lane; a preempted one comes back to it.
        written_by: the last step that runs tokens of it, -1 before the first.
    """

    request_id: int
    request: Request
    blocks: list[int] = field(default_factory=list)
    cached: int = 0
    output: list[int] = field(default_factory=list)
    row: int | None = None
    written_by: int = -1

    @property
    def is_prefilled(self) -> bool:
        """Whether the whole prompt has been run."""
        return self.cached >= len(self.request.prompt)

    @property
    def max_cached(self) -> int:
        """Tokens that can ever be in the cache: the last one drawn is never run."""
        return len(self.request.prompt) + self.request.max_new_tokens - 1


@dataclass
class _Lane:
    rows: list[Sequence | None]
    waiting: deque[Sequence] = field(default_factory=deque)
    in_flight: dict[int, list[Sequence]] = field(default_factory=dict)
    """By step: whose tokens it draws, in the order of its samples."""
    was_prefill: bool = False


class Batcher:
    """Owns the lanes and the block tables; knows nothing of processes.

    Args:
        config: shapes and limits.
        allocator: block ids; the scheduler shares it.
        eos: tokens that end a text.
        is_hazard: `Scheduler.is_hazard`; a request that follows on from such a step is put off.
    """

    def __init__(
        self,
        config: EngineConfig,
        allocator: BlockAllocator,
        eos: Iterable[int] = (),
        *,
        is_hazard: Callable[[int], bool] = lambda _: False,
    ) -> None:
        self._config = config
        self._is_hazard = is_hazard
        self._allocator = allocator
        self._eos = frozenset(eos)
        self._lanes = [_Lane([None] * config.max_batch) for _ in range(config.lanes)]
        self._count = 0
        self._preempted = 0
        self.group = 0
        """Of processes; goes into every step."""

    @property
    def preempted(self) -> int:
        """How often a request has lost its blocks to a shrink, and began anew."""
        return self._preempted

    def check(self, request: Request) -> None:
        """Refuse a request that could never run.

        Raises:
            InvalidArgumentError: naming the limit that it breaks.
        """
        if not request.prompt or request.max_new_tokens < 1:
            raise InvalidArgumentError("a request needs a prompt and at least one new token")
        total = len(request.prompt) + request.max_new_tokens
        if total > self._config.max_tokens:
            raise InvalidArgumentError(
                f"prompt and output take {total} tokens; max_tokens is {self._config.max_tokens}"
            )
        needed = self._blocks_for(total - 1)
        if needed > self._config.first_capacity - 1:
            raise InvalidArgumentError(
                f"the request takes {needed} blocks; there are {self._config.first_capacity - 1}"
            )

    def add(self, request_id: int, request: Request) -> None:
        """Queue a request; lanes take turns, in the order of submission."""
        self.check(request)
        lane = self._lanes[self._count % len(self._lanes)]
        lane.waiting.append(Sequence(request_id, request))
        self._count += 1

    @property
    def is_idle(self) -> bool:
        """Whether there is no request left, waiting, running or yet to arrive."""
        return not any(lane.waiting or any(lane.rows) for lane in self._lanes)

    def is_busy(self, seq: int) -> bool:
        """Whether the lane of step `seq` waits for a result before it can go on.

        A step that draws tokens does; chunks of prompts that draw none may follow one another.
        """
        flying = self._lanes[seq % len(self._lanes)].in_flight
        return any(flying.values()) or len(flying) >= self._config.chunks_in_flight

    @property
    def in_flight(self) -> bool:
        """Whether any step is under way."""
        return any(lane.in_flight for lane in self._lanes)

    def remap(self, moves: Mapping[int, int]) -> None:
        """Follow blocks that the scheduler moved; steps built from now on use the new ids."""
        for lane in self._lanes:
            for sequence in filter(None, lane.rows):
                sequence.blocks = [moves.get(block, block) for block in sequence.blocks]

    def preempt(self, lacking: int, capacity: int) -> list[int]:
        """Take the blocks of running requests, the youngest first; they are computed anew later.

        What was computed comes out the same once more: a request goes back to its row, its prompt
        through chunks and its output, without being drawn again, through decode steps.

        Args:
            lacking: how many blocks are wanted.
            capacity: the capacity that they are wanted for; a request that would not fit keeps its
                blocks, since it could not come back.

        Returns:
            Blocks for `Scheduler.freed`; fewer than wanted, even none, where there are no more.
        """
        running = [
            (sequence, lane)
            for lane in self._lanes
            for sequence in lane.rows
            if sequence is not None and len(sequence.blocks) < capacity
        ]
        found: list[int] = []
        for sequence, lane in sorted(running, key=lambda pair: -pair[0].request_id):
            if len(found) >= lacking:
                break
            found += self.remove(sequence)
            sequence.cached, sequence.written_by = 0, -1
            # The oldest of them is the last one taken, and so the first one to come back.
            lane.waiting.appendleft(sequence)
            self._preempted += 1
        return found

    def build(self, stamp: Stamp, capacity: int | None = None) -> tuple[Step, list[int]]:
        """Build the step of a stamp.

        Args:
            stamp: of the step.
            capacity: of a shrink that is to come: no request is admitted beyond it.

        Returns:
            The step, and the ids of the requests that it has admitted.
        """
        lane = self._lanes[stamp.seq % len(self._lanes)]
        admitted = self._admit(lane, stamp.seq, capacity)
        rows = [row for row in lane.rows if row is not None and not self._is_hazard(row.written_by)]
        prefill = min(
            (s for s in rows if not s.is_prefilled), key=lambda s: s.request_id, default=None
        )
        has_decode = any(sequence.is_prefilled for sequence in rows)
        # Prompts and decodes take turns, so that neither waits for all of the other.
        if prefill is not None and not (lane.was_prefill and has_decode):
            lane.was_prefill = True
            return self._prefill(lane, stamp, prefill), admitted
        lane.was_prefill = False
        if has_decode:
            return self._decode(lane, stamp), admitted
        lane.in_flight[stamp.seq] = []
        return Step(stamp, self.group, "empty", [], [], [], [], [], [], [], []), admitted

    def finish(self, seq: int, tokens: list[int]) -> list[tuple[Sequence, int]]:
        """Take the tokens that step `seq` drew; returns each with its sequence."""
        lane = self._lanes[seq % len(self._lanes)]
        running = lane.in_flight.get(seq, [])
        if len(tokens) != len(running):
            raise InvalidArgumentError(
                f"step {seq} drew {len(tokens)} tokens; expected {len(running)}"
            )
        drawn = list(zip(running, tokens, strict=True))
        for sequence, token in drawn:
            sequence.output.append(token)
        lane.in_flight.pop(seq, None)
        return drawn

    def end_of(self, sequence: Sequence) -> str:
        """Return why a sequence has ended: "eos", "length", or nothing."""
        if sequence.request.stop_at_eos and sequence.output and sequence.output[-1] in self._eos:
            return "eos"
        return "length" if len(sequence.output) >= sequence.request.max_new_tokens else ""

    def remove(self, sequence: Sequence) -> list[int]:
        """Take a sequence out of its row; returns its blocks, for `Scheduler.freed`."""
        for lane in self._lanes:
            lane.rows = [None if row is sequence else row for row in lane.rows]
            if sequence in lane.waiting:  # preempted while its last step was under way
                lane.waiting.remove(sequence)
        blocks, sequence.blocks = sequence.blocks, []
        return blocks

    # -- one step ------------------------------------------------------------------------------

    def _admit(self, lane: _Lane, seq: int, capacity: int | None) -> list[int]:
        admitted: list[int] = []
        while lane.waiting and lane.waiting[0].request.arrival_step <= seq:
            free = [row for row, sequence in enumerate(lane.rows) if sequence is None]
            needed = self._blocks_for(lane.waiting[0].max_cached)
            room = self._allocator.num_free
            if capacity is not None:
                room = min(room, capacity - self._allocator.num_live)
            if not free or needed > room:
                break
            sequence = lane.waiting.popleft()
            sequence.blocks = list(self._allocator.allocate(needed))
            if sequence.row is None:
                sequence.row = free[0]
            lane.rows[sequence.row] = sequence
            admitted.append(sequence.request_id)
        return admitted

    def _prefill(self, lane: _Lane, stamp: Stamp, sequence: Sequence) -> Step:
        prompt, chunk = sequence.request.prompt, self._config.chunk
        start = sequence.cached
        tokens = list(prompt[start : start + chunk])
        count, padding = len(tokens), chunk - len(tokens)
        sequence.cached += count
        sequence.written_by = stamp.seq
        positions = list(range(start, start + count))
        samples = []
        lane.in_flight[stamp.seq] = []
        if sequence.is_prefilled:
            lane.in_flight[stamp.seq] = [sequence]
            samples = [self._sample(sequence, 0)]
        if sequence.output:  # preempted before: its tokens are known
            lane.in_flight[stamp.seq], samples = [], []
        return Step(
            stamp=stamp,
            group=self.group,
            kind="prefill",
            tokens=tokens + [0] * padding,
            positions=positions + [0] * padding,
            slots=[self._slot(sequence, at) for at in positions] + [-1] * padding,
            block_tables=[sequence.blocks, [0] * len(sequence.blocks)],
            seq_lens=[start + count, 0],
            query_start=[0, count, chunk],
            logit_rows=[count - 1] if samples else [],
            samples=samples,
        )

    def _decode(self, lane: _Lane, stamp: Stamp) -> Step:
        size = len(lane.rows)
        tokens, positions, slots, lens = [0] * size, [0] * size, [-1] * size, [0] * size
        tables: list[list[int]] = [[] for _ in range(size)]
        samples: list[Sample] = []
        running: list[Sequence] = []
        lane.in_flight[stamp.seq] = running
        for row, sequence in enumerate(lane.rows):
            if sequence is None or not sequence.is_prefilled:
                continue
            if self._is_hazard(sequence.written_by):
                continue
            at = sequence.cached
            sequence.cached += 1
            sequence.written_by = stamp.seq
            known = at - len(sequence.request.prompt)
            tokens[row], positions[row] = sequence.output[known], at
            slots[row], lens[row] = self._slot(sequence, at), at + 1
            tables[row] = sequence.blocks
            if known + 1 == len(sequence.output):  # else preempted before: the next one is known
                samples.append(self._sample(sequence, row))
                running.append(sequence)
        width = max(len(table) for table in tables)
        return Step(
            stamp=stamp,
            group=self.group,
            kind="decode",
            tokens=tokens,
            positions=positions,
            slots=slots,
            block_tables=[table + [0] * (width - len(table)) for table in tables],
            seq_lens=lens,
            query_start=list(range(size + 1)),
            logit_rows=list(range(size)),
            samples=samples,
        )

    def _sample(self, sequence: Sequence, row: int) -> Sample:
        request = sequence.request
        return Sample(row, sequence.cached, request.temperature, request.seed)

    def _slot(self, sequence: Sequence, position: int) -> int:
        size = self._config.block_size
        return sequence.blocks[position // size] * size + position % size

    def _blocks_for(self, tokens: int) -> int:
        return -(-tokens // self._config.block_size)

"""A pipeline that runs in one thread, one event at a time, in an order that a test chooses.

Scheduler, stages, sessions, gates, write logs and block allocator are the real ones; the patch
channels are queues, and a layer's KV is a dictionary. So every order in which steps, their results,
patches and messages can overtake each other can be played, and is the same each time.
"""

from __future__ import annotations

import random
import time
from collections import deque
from dataclasses import dataclass, field

import numpy as np

import pipelive_kv as pk
from pipelive_kv.messages import Propose, Settle
from pipelive_kv.stage.session import StageSession
from pipelive_kv.stage.target import TargetSession

BLOCK_SIZE = 2
MAX_BLOCKS = 64
EPOCH = 1
SPEC = pk.KVSpec(num_kv_heads=1, head_dim=8, dtype="float32", block_size=BLOCK_SIZE)


class Untouched:
    """A decision record for where everything is told in time."""

    def decide(self, decision):
        raise AssertionError(f"asked to record {decision}")

    def read(self, epoch):
        raise AssertionError(f"asked for epoch {epoch}")


class BlockedError(Exception):
    """A gate is closed."""


@dataclass(eq=False)
class Link:
    """The patch channel of one move."""

    source: int
    target: int
    layers: tuple[int, ...]
    gates_open: bool = False
    """The mutation: nobody waits."""
    queue: deque = field(default_factory=deque)
    applied: int = -1

    def wait_applied(self, seq: int, timeout: float) -> None:
        if self.applied < seq and not self.gates_open:
            raise BlockedError(f"step {seq} of stage {self.source}; applied are {self.applied}")

    def check(self) -> None:
        pass

    def interrupt(self) -> None:
        pass

    cancel = arm = interrupt


class Source:
    """The sending half of a stage: what `SourceSession` does, when the test says so."""

    def __init__(self, tracker: pk.DirtyTracker) -> None:
        self.tracker = tracker
        self.sent = -1
        self.limit: int | None = None

    def sealed(self, seq: int) -> None:
        pass

    def promise(self) -> None:
        pass

    def commit(self, step: int) -> None:
        if self.limit is None:
            self.tracker.hold_from(step)
            self.limit = step - 1

    @property
    def has_work(self) -> bool:
        last = self.tracker.sealed_through
        return self.sent < (last if self.limit is None else min(last, self.limit))


@dataclass(eq=False)
class Request:
    prompt: int
    new: int
    blocks: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    """The number that each of its tokens, up to the last one stamped, has in the KV."""
    writers: list[int] = field(default_factory=list)
    """The step that writes each of them."""

    def slot(self, position: int) -> int:
        return self.blocks[position // BLOCK_SIZE] * BLOCK_SIZE + position % BLOCK_SIZE


@dataclass
class Message:
    stamp: pk.Stamp
    reads: list[tuple[int, int]]
    writes: list[tuple[int, int]]
    follows_on: bool = False
    """Whether it touches what a step under way writes."""


class World:
    """Everything, and the events that can happen next."""

    def __init__(
        self, seed, old, new, *, in_flight, switch_at, requests, mutation="", narrows=False
    ) -> None:
        """With ``narrows``, nothing is put off or kept back; each step tells what it touches."""
        self.random = random.Random(seed)
        self.old, self.new = pk.Placement.from_counts(old), pk.Placement.from_counts(new)
        self.in_flight, self.switch_at, self.mutation = in_flight, switch_at, mutation
        self.allocator = pk.BlockAllocator(MAX_BLOCKS, MAX_BLOCKS)
        self.narrows = narrows
        self.scheduler = pk.Scheduler(
            self.old, allocator=self.allocator, defers_hazards=not narrows, record=Untouched()
        )
        self.size = len(old)
        self.pools = []
        self.stages: list[pk.Stage] = []
        self.kv: list[dict[int, dict[int, int]]] = []
        self.sources: dict[int, Source] = {}
        self.links = [
            Link(move.source, move.target, move.layers, mutation == "gate")
            for move in self.old.moves_to(self.new)
        ]
        for rank in range(self.size):
            self._make_stage(rank)
        self.inboxes: list[deque[Message]] = [deque() for _ in old]
        self.running: list[object] = [None for _ in old]
        self.open_step: list[Message | None] = [None for _ in old]
        self.finished: deque[Message] = deque()
        self.flying = 0
        self.retired = -1
        self.waiting = [
            Request(self.random.randint(1, 14), self.random.randint(1, 5)) for _ in range(requests)
        ]
        self.requests: list[Request] = []
        self.next_token = 1
        self.k = -1
        self.settled = False
        self.to_commit = set(range(self.size))
        self.deferred: list[int] = []
        self.blocked_gates = 0
        self.shared = self.followed = self.narrowed = 0
        # How often each kind of event is chosen: some orders are rare otherwise.
        self.weights = {
            kind: 10 ** self.random.uniform(-1.5, 1)
            for kind in ("stamp", "run", "send", "apply", "result", "commit", "settle")
        }

    def _make_stage(self, rank) -> None:
        pool = pk.KVPool(
            SPEC,
            num_layers=self.old.num_layers,
            layers=self.old.layers_of(rank),
            max_blocks=MAX_BLOCKS,
            capacity=MAX_BLOCKS,
            budget="1MiB",
            page_bytes=4096,
        )
        stage = pk.Stage(pp_rank=rank, pp_size=self.size, pool=pool, placement=self.old)
        gained = sorted(set(self.new.layers_of(rank)) - set(self.old.layers_of(rank)))
        target = TargetSession(
            EPOCH,
            tuple(gained),
            pool,
            None,
            stage.hooks,
            stage.background,
            weights_from="source",
            verify=False,
            ends_at=time.monotonic() + 600,
        )
        target.make_room()
        for link in self.links:
            if link.target == rank:
                target.listen(link)
        target.load(1)
        session = StageSession(EPOCH, rank, self.old, self.new, target)
        stage.open_session(session)
        if any(link.source == rank for link in self.links):
            session.source = self.sources[rank] = Source(stage.tracker)
        for event in ("Connect", "StartCopy", "WriteThrough", "Arm"):
            stage.take(event, EPOCH)
        session.arm()
        self.pools.append(pool)
        self.stages.append(stage)
        self.kv.append({layer: {} for layer in range(self.old.num_layers)})

    def close(self) -> None:
        self.scheduler.close()
        for stage, pool in zip(self.stages, self.pools, strict=True):
            stage.close()
            pool.close()

    # -- what can happen ---------------------------------------------------------------------------

    def play(self) -> None:
        """One event after the other until all requests are served and the switchover is over."""
        stuck: set[tuple] = set()
        for _ in range(20_000):
            events = [event for event in self._events() if event not in stuck]
            if not events:
                if stuck:
                    raise AssertionError(f"all wait for each other: {sorted(stuck)}")
                return self._check_end()
            weights = [self.weights[event[0]] for event in events]
            event = self.random.choices(events, weights)[0]
            if getattr(self, "_" + event[0])(*event[1:]) is False:
                stuck.add(event)
            else:
                stuck.clear()
        raise AssertionError("no end is reached")

    def _events(self):
        at_k = self.scheduler.next_seq == self.k and not self.settled
        over = not self.requests and not self.waiting and 0 <= self.k < self.scheduler.next_seq
        if self.flying < self.in_flight and not at_k and not over:
            yield ("stamp",)
        for rank in range(self.size):
            if self.running[rank] is not None or self.inboxes[rank]:
                yield ("run", rank)
            source = self.sources.get(rank)
            if source is not None and source.has_work:
                yield ("send", rank)
            if self.settled and rank in self.to_commit:
                yield ("commit", rank)
        for index, link in enumerate(self.links):
            if link.queue:
                yield ("apply", index)
        if self.finished:
            yield ("result",)
        if self.k >= 0 and not self.settled:
            yield ("settle",)

    def _stamp(self) -> None:
        if self.k < 0 and self.scheduler.next_seq >= self.switch_at:
            margin = self.random.randint(0, 3)
            request = Propose(EPOCH, self.new.stages, "", margin, 600.0)
            self.k = self.scheduler._handle(request).step
            if self.scheduler.next_seq == self.k:
                return
        stamp = self.scheduler.stamp()
        message = Message(stamp, [], [])
        self._build(message)
        if self.narrows and self.random.random() < 0.9:
            message.stamp = self._narrowed(message)
        if not self.narrows:
            assert stamp.needs == self.retired  # a gate never waits for steps under way
        self.inboxes[0].append(message)
        self.flying += 1

    def _narrowed(self, message) -> pk.Stamp:
        writes = {slot // BLOCK_SIZE for slot, _ in message.writes}
        touches = writes | {slot // BLOCK_SIZE for slot, _ in message.reads}
        if self.mutation == "narrow":
            touches = writes = set()
        stamp = self.scheduler.narrow(message.stamp, touches=touches, writes=writes)
        message.follows_on = stamp.needs > self.retired
        self.followed += message.follows_on
        self.narrowed += self.retired <= stamp.needs < stamp.seq - 1
        return stamp

    def _settle(self) -> None:
        self.scheduler._handle(Settle(EPOCH, commit=True))
        self.settled = True

    def _commit(self, rank) -> None:
        self.to_commit.discard(rank)
        if self.stages[rank].epoch != EPOCH:
            self.stages[rank].take("Commit", EPOCH)
            self.stages[rank].session.commit(self.k)

    def _run(self, rank):
        if self.running[rank] is None:
            self.open_step[rank] = self.inboxes[rank].popleft()
            self.running[rank] = self._step(rank, self.open_step[rank])
        if next(self.running[rank]) == "blocked":
            self.blocked_gates += 1
            return False
        return True

    def _step(self, rank, message):
        stage = self.stages[rank]
        slots = np.array([slot for slot, _ in message.writes], dtype=np.int64)
        step = stage.begin(message.stamp, slots)
        yield "began"
        for layer in step.layers:
            while True:
                try:
                    step.gate(layer)
                    break
                except BlockedError:
                    if not self.narrows or (message.stamp.needs and not message.follows_on):
                        self._check_blocked(rank, layer, message.stamp)
                    yield "blocked"
            memory = self.kv[rank][layer]
            for slot, token in message.reads:
                assert memory.get(slot) == token, (
                    f"stage {rank}, step {message.stamp.seq} (k is {self.k}), layer {layer}, slot "
                    f"{slot}: found token {memory.get(slot)}, expected {token}"
                )
            memory.update(message.writes)
            yield "ran"
        stage.end(step)
        self.running[rank] = self.open_step[rank] = None
        following = self.inboxes[rank + 1] if rank + 1 < self.size else self.finished
        following.append(message)
        yield "ended"

    def _check_blocked(self, rank, layer, stamp) -> None:
        """No drain: a closed gate waits for a transfer, not for a step that still runs."""
        (link,) = [x for x in self.links if x.target == rank and layer in x.layers]
        assert self.stages[link.source].tracker.sealed_through >= min(stamp.needs, self.k - 1)

    def _send(self, rank) -> None:
        source = self.sources[rank]
        collected = source.tracker.collect()
        slots = [slot for first, count in collected.ranges for slot in range(first, first + count)]
        through = collected.through_seq
        running = self.open_step[rank]
        if self.mutation == "unsealed" and running is not None:
            slots += [slot for slot, _ in running.writes]
            through = running.stamp.seq
        source.sent = through
        for link in self.links:
            if link.source == rank:
                content = {
                    layer: {s: self.kv[rank][layer][s] for s in slots if s in self.kv[rank][layer]}
                    for layer in link.layers
                }
                link.queue.append((through, content))

    def _apply(self, index) -> None:
        link = self.links[index]
        through, content = link.queue.popleft()
        for layer, values in content.items():
            self.kv[link.target][layer].update(values)
        link.applied = max(link.applied, through)

    def _result(self) -> None:
        message = self.finished.popleft()
        self.retired = message.stamp.seq
        self.scheduler.retired(self.retired)
        self.flying -= 1
        for request in [r for r in self.requests if len(r.tokens) >= r.prompt + r.new]:
            if request.writers[-1] <= self.retired:
                self._end(request)

    # -- the engine --------------------------------------------------------------------------------

    def _build(self, message) -> None:
        if self.requests and self.random.random() < 0.05:
            self._end(self.random.choice(self.requests))  # its caller has gone
        while self.waiting and len(self.requests) < 4 and self.random.random() < 0.5:
            self._admit(self.waiting.pop())
        for request in self.random.sample(self.requests, len(self.requests)):
            if self.random.random() < 0.8:
                self._extend(request, message)

    def _admit(self, request) -> None:
        """A prefix hit shares blocks that are hashed already, whether or not they are computed."""
        if self.requests and self.random.random() < 0.6:
            donor = self.random.choice(self.requests)
            full = min(len(donor.tokens), donor.prompt, request.prompt - 1) // BLOCK_SIZE
            if full > 0:
                request.blocks = donor.blocks[:full]
                self.allocator.share(request.blocks)
                request.tokens = donor.tokens[: full * BLOCK_SIZE]
                request.writers = donor.writers[: full * BLOCK_SIZE]
                self.shared += any(seq > self.retired for seq in request.writers)
        self.requests.append(request)

    def _extend(self, request, message) -> None:
        done = len(request.tokens)
        if done >= request.prompt:  # a token needs the one before
            if done >= request.prompt + request.new or request.writers[-1] > self.retired:
                return
            count = 1
        else:
            count = min(self.random.randint(1, 4), request.prompt - done)
        if not self.narrows and any(self.scheduler.is_hazard(seq) for seq in request.writers):
            self.deferred.append(message.stamp.seq)
            if self.mutation != "hazards":
                return
        missing = -(-(done + count) // BLOCK_SIZE) - len(request.blocks)
        if missing > 0:
            if missing > self.allocator.num_free:
                return
            request.blocks = request.blocks + self.allocator.allocate(missing)
        message.reads += [(request.slot(at), request.tokens[at]) for at in range(done)]
        for position in range(done, done + count):
            message.writes.append((request.slot(position), self.next_token))
            request.tokens.append(self.next_token)
            request.writers.append(message.stamp.seq)
            self.next_token += 1

    def _end(self, request) -> None:
        self.requests.remove(request)
        if request.blocks and self.narrows:  # as an engine without a quarantine does
            self.allocator.release(request.blocks)
        elif request.blocks:
            self.scheduler.freed(request.blocks)

    def _check_end(self) -> None:
        assert not self.requests
        assert not self.waiting
        assert self.flying == 0
        assert {stage.epoch for stage in self.stages} == {EPOCH}
        assert self.allocator.live() == [0]
        for seq in self.deferred:  # pp_size - 1 steps, where as many steps are in flight as stages
            assert self.k <= seq < self.k + self.in_flight - 1
        for link in self.links:
            assert link.applied == self.k - 1

"""A pipeline without a model: real scheduler, stages, pools and transport, checked token by token.

Each token that a step writes gets a number of its own. A stage that runs a layer first checks that
every earlier token of the step's sequences still has its number in that layer, then writes the new
ones. So a lost, late, torn or misplaced write shows at the first step that reads it.
"""

from __future__ import annotations

import os
import queue
import random
import threading
from dataclasses import dataclass, field

import numpy as np

import pipelive_kv as pk

BLOCK_SIZE = 4
LAYER_STEP = 64


def spec() -> pk.KVSpec:
    return pk.KVSpec(num_kv_heads=2, head_dim=8, dtype="float32", block_size=BLOCK_SIZE)


@dataclass
class Sequence:
    blocks: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)

    def slot(self, position: int) -> int:
        return self.blocks[position // BLOCK_SIZE] * BLOCK_SIZE + position % BLOCK_SIZE


@dataclass
class Message:
    stamp: pk.Stamp
    reads: list[tuple[int, int]]
    writes: list[tuple[int, int]]
    layers_run: list[int] = field(default_factory=list)


class Hooks(pk.EngineHooks):
    """Fails on demand, and keeps a log of what was called."""

    def __init__(self) -> None:
        self.fail_in: str | None = None
        self.log: list[tuple[str, object]] = []

    def _note(self, name: str, what: object) -> None:
        self.log.append((name, what))
        if self.fail_in == name:
            raise RuntimeError(f"the engine's {name} failed on purpose")

    def prepare(self, layers, arena):
        self._note("prepare", tuple(layers))

    def warmup(self, placement):
        self._note("warmup", placement)

    def activate(self, placement):
        self.log.append(("activate", placement))

    def discard(self, layers):
        self.log.append(("discard", tuple(layers)))

    def retire(self, layers):
        self.log.append(("retire", tuple(layers)))


class WeightsElsewhere:
    """Weights in memory of the engine's own, as a LayerWeights.

    Notes the pool when they load, and the niceness of the thread that does.
    """

    in_pool = False
    BYTES = 8192

    def __init__(self, pages, layers):
        self._pages = pages
        self._held = set(layers)
        self.at_load = []
        self.niceness = []

    @property
    def layers(self):
        return tuple(sorted(self._held))

    def layer_bytes(self, layer):
        return self.BYTES

    def add(self, layer):
        self._held.add(layer)

    def load(self, layer):
        self.at_load.append(self._pages.stats())
        self.niceness.append(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))

    def drop(self, layer):
        self._held.discard(layer)


class StageWorker:
    """One stage and the thread that runs its steps."""

    def __init__(
        self,
        rank,
        size,
        placement,
        endpoint,
        *,
        capacity,
        max_blocks,
        budget,
        transport,
        joins=False,
        page_bytes=4096,
        weights=None,
        background_nice=0,
    ):
        """``weights``, a WeightSource, brings layers' weights into the pool of pages.

        With "elsewhere" they are :class:`WeightsElsewhere`.
        """
        pages = pk.PagePool(budget, page_bytes=page_bytes)
        self.weights = None
        if weights == "elsewhere":
            self.weights = WeightsElsewhere(pages, placement.layers_of(rank))
        elif weights is not None:
            self.weights = pk.WeightArena(pages, weights, placement.num_layers)
            for layer in placement.layers_of(rank):
                self.weights.add(layer)
                self.weights.load(layer)
        self.pool = pk.KVPool(
            spec(),
            num_layers=placement.num_layers,
            layers=placement.layers_of(rank),
            max_blocks=max_blocks,
            capacity=capacity,
            page_pool=pages,
        )
        self.hooks = Hooks()
        self.stage = pk.Stage(
            pp_rank=rank,
            pp_size=size,
            pool=self.pool,
            placement=placement,
            hooks=self.hooks,
            control=endpoint,
            transport=transport,
            joins=joins,
            weights=self.weights,
            background_nice=background_nice,
        )
        self.inbox: queue.Queue[Message | None] = queue.Queue()
        self.forward = None
        self.error: BaseException | None = None
        self.thread = threading.Thread(target=self._run, name=f"stage-{rank}", daemon=True)

    def _run(self):
        while (message := self.inbox.get()) is not None:
            try:
                self._step(message)
            except BaseException as error:
                self.error = error
                self.forward(None)
                return
            self.forward(message)

    def _step(self, message):
        slots = np.array([slot for slot, _ in message.writes], dtype=np.int64)
        step = self.stage.begin(message.stamp, slots)
        for layer in step.layers:
            step.gate(layer)
            view = np.from_dlpack(self.pool.layer(layer))
            for slot, token in message.reads:
                block, offset = divmod(slot, BLOCK_SIZE)
                found = view[block, :, :, offset, :]
                expected = token * LAYER_STEP + layer
                if not (found == expected).all():
                    raise AssertionError(
                        f"stage {self.stage.pp_rank}, step {message.stamp.seq}, epoch "
                        f"{message.stamp.epoch}, layer {layer}, slot {slot}: found "
                        f"{sorted(set(found.ravel().tolist()))}, expected {expected}"
                    )
            for slot, token in message.writes:
                block, offset = divmod(slot, BLOCK_SIZE)
                view[block, :, :, offset, :] = token * LAYER_STEP + layer
            message.layers_run.append(layer)
        self.stage.end(step)

    def close(self):
        self.inbox.put(None)
        self.thread.join(timeout=30)
        self.stage.close()
        self.pool.close()


class Pipeline:
    """The driver: keeps sequences, stamps steps and has several of them in flight."""

    def __init__(
        self,
        counts,
        record_dir,
        *,
        capacity=40,
        max_blocks=40,
        budget="64MiB",
        in_flight=3,
        transport="tcp",
        seed=0,
        endpoint=None,
        remote=0,
        moves_per_step=3,
        **more,
    ):
        """``record_dir`` is a directory, or a record that coordinator and scheduler are given.

        With an ``endpoint``, the coordinator is somebody else's.

        The last ``remote`` stages are somebody else's as well; they take part in no step.
        """
        self.placement = pk.Placement.from_counts(counts)
        self.random = random.Random(seed)
        self.in_flight = in_flight
        self.coordinator = None
        own = {"record": record_dir} if hasattr(record_dir, "decide") else {}
        if endpoint is None:
            self.coordinator = pk.Coordinator(
                pk.ControlEndpoint("tcp://127.0.0.1:*", pk.ControlKey.generate()),
                pp_size=len(counts),
                **(own or {"record_dir": record_dir}),
            )
            endpoint = self.coordinator.endpoint
        self.allocator = pk.BlockAllocator(max_blocks, capacity)
        self.scheduler = pk.Scheduler(
            self.placement,
            allocator=self.allocator,
            control=endpoint,
            moves_per_step=moves_per_step,
            **own,
        )
        self.scheduler.on_remap(self._remap)
        self.workers = [
            StageWorker(
                rank,
                len(counts),
                self.placement,
                endpoint,
                capacity=capacity,
                max_blocks=max_blocks,
                budget=budget,
                transport=transport,
                **more,
            )
            for rank in range(len(counts) - remote)
        ]
        self.results: queue.Queue[Message | None] = queue.Queue()
        self._chain()
        for worker in self.workers:
            worker.thread.start()
        self.settings = {"max_blocks": max_blocks, "budget": budget, "transport": transport}
        self.endpoint = endpoint
        self.sequences: list[Sequence] = []
        self.most_live = max_blocks
        """Blocks that the steps may hold; the pace of the machine decides how many they come to."""
        self.next_token = 1
        self.flying = 0
        if self.coordinator is not None and not remote:
            self.coordinator.await_ready(30)

    def _chain(self):
        """Everybody passes messages on to the next one; call with no step under way."""
        following = [worker.inbox.put for worker in self.workers[1:]]
        for worker, forward in zip(self.workers, [*following, self.results.put], strict=True):
            # A worker that fails tells the driver, whatever its rank is.
            worker.forward = lambda m, f=forward: f(m) if m is not None else self.results.put(None)

    def join(self, rank, *, capacity=None, **changes):
        """A stage comes to the running pipeline."""

        def attach():
            size = max(rank + 1, self.scheduler.placement.num_stages)
            worker = StageWorker(
                rank,
                size,
                self.scheduler.placement.padded(size),
                self.endpoint,
                capacity=capacity or self.allocator.capacity,
                joins=True,
                **{**self.settings, **changes},
            )
            self.drain()
            self.workers = sorted([*self.workers, worker], key=lambda w: w.stage.pp_rank)
            self._chain()
            worker.thread.start()
            self.step()
            self.drain()

        self.coordinator.add_stage(rank, attach, timeout=60)

    def leave(self, rank):
        """A stage without layers goes."""

        def detach():
            self.drain()
            (gone,) = [worker for worker in self.workers if worker.stage.pp_rank == rank]
            self.workers.remove(gone)
            self._chain()
            gone.close()

        self.coordinator.remove_stage(rank, detach, timeout=60)

    def _remap(self, moves):
        for sequence in self.sequences:
            sequence.blocks = [moves.get(block, block) for block in sequence.blocks]

    # -- steps -------------------------------------------------------------------------------------

    def step(self, *, empty=False):
        """Stamp and send one step; wait for an older one where too many are in flight."""
        while self.flying >= self.in_flight:
            self._take_result()
        if not empty and self.random.random() < 0.15 and self.sequences:
            ended = self.sequences.pop(self.random.randrange(len(self.sequences)))
            self.scheduler.freed(ended.blocks)
        stamp = self.scheduler.stamp()
        reads, writes = [], []
        if not empty:
            self._build(reads, writes)
        self.workers[0].inbox.put(Message(stamp, reads, writes))
        self.flying += 1

    def _build(self, reads, writes):
        if len(self.sequences) < 4 and self.random.random() < 0.4:
            self.sequences.append(Sequence())
        chosen = self.random.sample(
            self.sequences, self.random.randint(0, min(3, len(self.sequences)))
        )
        for sequence in chosen:
            count = self.random.choice([1, 1, 1, 3, 7])
            position = len(sequence.tokens)
            needed = -(-(position + count) // BLOCK_SIZE) - len(sequence.blocks)
            if needed > 0 and needed > self._free():
                continue
            sequence.blocks += self.allocator.allocate(needed) if needed > 0 else []
            reads += [(sequence.slot(i), token) for i, token in enumerate(sequence.tokens)]
            for index in range(position, position + count):
                sequence.tokens.append(self.next_token)
                writes.append((sequence.slot(index), self.next_token))
                self.next_token += 1

    def _free(self):
        return min(self.allocator.num_free, self.most_live - len(self.allocator.live()))

    def _take_result(self):
        message = self.results.get(timeout=60)
        if message is None:
            raise next(w.error for w in self.workers if w.error is not None)
        assert message.layers_run == list(range(self.placement.num_layers))
        self.scheduler.retired(message.stamp.seq)
        self.flying -= 1

    def drain(self):
        while self.flying:
            self._take_result()

    def run(self, steps):
        for _ in range(steps):
            self.step()

    def run_until(self, job, *, idle=False):
        """Run steps until the job has ended."""
        while not job.phase.is_final:
            if idle and not self.scheduler.wants_step:
                self.drain()
                continue
            self.step(empty=idle)
        self.drain()

    # -- checks ------------------------------------------------------------------------------------

    def check(self, placement):
        """Every part agrees on the placement, and holds what it should and nothing else."""
        self.run(3)
        self.drain()
        assert self.scheduler.placement == placement
        for worker in self.workers:
            assert worker.stage.placement == placement
            assert tuple(worker.pool.layers) == placement.layers_of(worker.stage.pp_rank)
            assert worker.stage.session is None
            assert worker.pool.capacity >= self.allocator.capacity

    def read_all(self):
        """One step that reads every token of every sequence."""
        reads = [
            (sequence.slot(index), token)
            for sequence in self.sequences
            for index, token in enumerate(sequence.tokens)
        ]
        stamp = self.scheduler.stamp()
        self.workers[0].inbox.put(Message(stamp, reads, []))
        self.flying += 1
        self.drain()

    def close(self):
        if self.coordinator is not None:
            self.coordinator.close()
        self.scheduler.close()
        for worker in self.workers:
            worker.close()

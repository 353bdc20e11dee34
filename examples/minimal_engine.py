"""The smallest engine that changes its pipeline split while it generates: six calls, no model.

A random transformer of numpy matrices decodes four sequences over two stages (threads here; in
earnest they are processes). Its layers move to the other stage and back while it does, and the
tokens are compared with a run in which nothing moved::

    python examples/minimal_engine.py
"""

from __future__ import annotations

import itertools
import tempfile
from dataclasses import dataclass

import numpy as np

import pipelive_kv as pk

LAYERS, WIDTH, HEADS, HEAD_DIM, VOCAB = 6, 64, 4, 16, 97
SPEC = pk.KVSpec(num_kv_heads=HEADS, head_dim=HEAD_DIM, dtype="float32", block_size=4)
SEQUENCES, TOKENS, BLOCKS_EACH = 4, 60, 20
FIRST, SECOND = pk.Placement.from_counts([4, 2]), pk.Placement.from_counts([1, 5])

Array = np.ndarray


@dataclass
class StepMessage:
    """What the driver sends to every stage: the stamp travels with the engine's own message."""

    stamp: pk.Stamp
    tokens: Array
    slots: Array
    block_tables: Array
    seq_lens: Array


def weights(layer: int) -> Array:
    """Query, key, value and output matrices; an engine would load them (see `WeightArena`)."""
    return np.random.default_rng(layer).normal(0, 0.3, (4, WIDTH, WIDTH)).astype(np.float32)


class Hooks(pk.EngineHooks):
    """The engine's part of a move: build what is gained in the background, forget what is lost."""

    def __init__(self, layers: tuple[int, ...]) -> None:
        self.ready = {layer: weights(layer) for layer in layers}

    def prepare(self, layers, arena):
        self.ready.update({layer: weights(layer) for layer in layers})

    def discard(self, layers):
        for layer in layers:
            self.ready.pop(layer)

    retire = discard


class Worker:
    """One stage: its share of the KV memory, a `Stage`, and the layers that it runs."""

    def __init__(self, rank: int, control: pk.ControlEndpoint) -> None:
        layers = FIRST.layers_of(rank)
        self.hooks = Hooks(layers)
        self.pool = pk.KVPool(
            SPEC, num_layers=LAYERS, layers=layers, max_blocks=128, capacity=128, page_bytes=4096
        )
        self.stage = pk.Stage(
            pp_rank=rank, pp_size=2, pool=self.pool, placement=FIRST, hooks=self.hooks,
            control=control,
        )  # fmt: skip

    def run(self, message: StepMessage, hidden: Array) -> Array:
        """One step. The stamp says which layers it runs here."""
        step = self.stage.begin(message.stamp, message.slots)
        for layer in step.layers:
            step.gate(layer)
            query, key, value, out = self.hooks.ready[layer]
            rows = (len(hidden), HEADS, HEAD_DIM)
            kv = self.pool.layer(layer)
            pk.append(kv, (hidden @ key).reshape(rows), (hidden @ value).reshape(rows),
                      message.slots)  # fmt: skip
            seen = pk.paged_attention((hidden @ query).reshape(rows), kv, message.block_tables,
                                      message.seq_lens, scale=HEAD_DIM**-0.5)  # fmt: skip
            hidden = np.tanh(hidden + seen.reshape(hidden.shape) @ out)
        self.stage.end(step)
        return hidden


def generate(moves: bool) -> tuple[list[list[int]], list[pk.Report]]:
    """Decode; with ``moves`` the placement changes while that goes on."""
    embedding = np.random.default_rng(99).normal(0, 1, (VOCAB, WIDTH)).astype(np.float32)
    reports, jobs = [], []
    with tempfile.TemporaryDirectory() as records:
        endpoint = pk.ControlEndpoint("tcp://127.0.0.1:*", pk.ControlKey.generate())
        coordinator = pk.Coordinator(endpoint, pp_size=2, record_dir=records)
        allocator = pk.BlockAllocator(max_blocks=128, capacity=128)
        scheduler = pk.Scheduler(FIRST, allocator=allocator, control=coordinator.endpoint)
        workers = [Worker(rank, coordinator.endpoint) for rank in range(2)]
        coordinator.await_ready(timeout=20)

        blocks = [allocator.allocate(BLOCKS_EACH) for _ in range(SEQUENCES)]

        def on_remap(moved: dict[int, int]) -> None:  # a shrink has moved blocks to lower ids
            for table in blocks:
                table[:] = [moved.get(block, block) for block in table]

        scheduler.on_remap(on_remap)
        wanted = itertools.cycle([SECOND, FIRST])
        texts: list[list[int]] = [[number + 1] for number in range(SEQUENCES)]
        for position in range(TOKENS):
            if moves and position % 20 == 5:
                jobs.append(coordinator.reconfigure(next(wanted)))
            while True:
                stamp = scheduler.stamp()  # block tables may change in here
                slots = [table[position // 4] * 4 + position % 4 for table in blocks]
                message = StepMessage(
                    stamp,
                    np.array([text[-1] for text in texts]),
                    np.array(slots, dtype=np.int64),
                    np.array(blocks, dtype=np.int32),
                    np.full(SEQUENCES, position + 1, dtype=np.int32),
                )
                hidden = embedding[message.tokens]
                for worker in workers:
                    hidden = worker.run(message, hidden)
                scheduler.retired(stamp.seq)
                # Once in a while the same step again, until the job is done: an engine would
                # simply go on with other work.
                if position % 20 != 15 or all(job.phase.is_final for job in jobs):
                    break
            for text, row in zip(texts, hidden @ embedding.T, strict=True):
                text.append(int(row.argmax()))
        reports = [job.wait(timeout=20) for job in jobs]
        for table in blocks:
            scheduler.freed(table)
        scheduler.close()
        for worker in workers:
            worker.stage.close()
            worker.pool.close()
        coordinator.close()
    return texts, reports


def main() -> None:
    unmoved, _ = generate(moves=False)
    moved, reports = generate(moves=True)
    for report in reports:
        print(f"{report.old} to {report.new} at step {report.step}: "
              f"{report.bytes_moved} bytes in {len(report.rounds)} rounds, "
              f"stop {report.stop_s * 1e3:.2f} ms")  # fmt: skip
    same = sum(a == b for a, b in zip(unmoved, moved, strict=True))
    print(f"tokens identical: {same}/{SEQUENCES}")
    raise SystemExit(same != SEQUENCES)


if __name__ == "__main__":
    main()

"""A pipeline inside one process: enough to drive the adapter's stages step by step."""

from __future__ import annotations

from pathlib import Path

import torch

from pipelive_kv.engines.transformers import StepBatch, TransformersModel, TransformersStage
from pipelive_kv.kv import KVPool
from pipelive_kv.memory import PagePool
from pipelive_kv.placement import Placement
from pipelive_kv.weights import WeightArena

BLOCK = 8
MAX_BLOCKS = 64


class LocalStage:
    def __init__(self, model: TransformersModel, rank: int, placement: Placement) -> None:
        self.pages = PagePool(1 << 30, page_bytes=64 << 10)
        self.source = model.open_weights()
        self.arena = WeightArena(self.pages, self.source, model.num_layers)
        # Every layer's KV, so that a test may move layers without moving KV pools.
        self.pool = KVPool(
            model.kv_spec(block_size=BLOCK),
            num_layers=model.num_layers,
            layers=range(model.num_layers),
            max_blocks=MAX_BLOCKS,
            capacity=MAX_BLOCKS,
            page_pool=self.pages,
        )
        self.stage = TransformersStage(
            model,
            rank=rank,
            kv=self.pool.layer,
            weights=self.source,
        )
        self.gain(placement.layers_of(rank))
        self.stage.activate(placement)

    def gain(self, layers) -> None:
        for layer in layers:
            self.arena.add(layer)
            self.arena.load(layer)
        self.stage.prepare(layers, self.arena)

    def lose(self, layers) -> None:
        self.stage.retire(layers)
        for layer in layers:
            self.arena.drop(layer)


class LocalPipeline:
    """Runs one sequence's tokens through all stages; blocks are scattered over the pool."""

    def __init__(self, path: Path, counts, *, dtype: str = "float32") -> None:
        self.model = TransformersModel(path, dtype=dtype)
        self.placement = Placement.from_counts(counts)
        self.stages = [LocalStage(self.model, rank, self.placement) for rank in range(len(counts))]
        self.gated: list[int] = []

    def table(self, sequence: int) -> torch.Tensor:
        blocks = [1 + (5 * i + 3 * sequence) % (MAX_BLOCKS - 1) for i in range(16)]
        return torch.tensor(blocks, dtype=torch.int32)

    def step(self, parts) -> torch.Tensor:
        """`parts` lists (sequence, start, tokens); returns the logits of all tokens."""
        ids, positions, slots, lens, starts, tables = [], [], [], [], [0], []
        for sequence, start, tokens in parts:
            table = self.table(sequence)
            for offset, token in enumerate(tokens):
                at = start + offset
                ids.append(token)
                positions.append(at)
                slots.append(int(table[at // BLOCK]) * BLOCK + at % BLOCK)
            lens.append(start + len(tokens))
            starts.append(len(ids))
            tables.append(table)
        batch = StepBatch(
            slots=torch.tensor(slots),
            block_tables=torch.stack(tables),
            seq_lens=torch.tensor(lens, dtype=torch.int32),
            query_start=torch.tensor(starts, dtype=torch.int32),
        )
        carried = torch.tensor(ids)
        for local in self.stages:
            if not local.stage.active_layers:
                continue
            carried = local.stage.forward(
                carried, torch.tensor(positions), batch, gate=self.gated.append
            )
        return carried

    def generate(self, prompt, count: int, *, chunk: int = 7, sequence: int = 0) -> list[int]:
        for start in range(0, len(prompt), chunk):
            logits = self.step([(sequence, start, prompt[start : start + chunk])])
        tokens = [int(logits[-1].argmax())]
        while len(tokens) < count:
            at = len(prompt) + len(tokens) - 1
            tokens.append(int(self.step([(sequence, at, tokens[-1:])])[-1].argmax()))
        return tokens

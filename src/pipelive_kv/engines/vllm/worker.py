"""The worker's side: KV memory from our pool, and a stage that every step passes through."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import numpy as np

from pipelive_kv.control import ControlEndpoint, ControlKey
from pipelive_kv.engines.vllm.config import Options, check_groups
from pipelive_kv.engines.vllm.layers import LayerFactory, VllmLayers
from pipelive_kv.errors import InvalidArgumentError, ProtocolError
from pipelive_kv.kv import KVPool, bytes_needed
from pipelive_kv.memory import PagePool
from pipelive_kv.placement import Placement
from pipelive_kv.spec import KVSpec
from pipelive_kv.stage import Stage, Step

__all__ = ["LayerFactory", "WorkerState", "memory_of", "start_stage"]

_PAGE_BYTES = 2 << 20

STAMP = "pipelive_stamp"
"""The attribute of vLLM's SchedulerOutput that carries a step's stamp."""


class WorkerState:
    """What a model runner holds for the plugin, from the allocation of its KV cache on."""

    def __init__(self, runner: Any, options: Options, kv_cache_config: Any) -> None:
        check_groups(kv_cache_config, runner.attn_groups)
        self._runner = runner
        self._options = options
        self.layers = VllmLayers(runner, self.kv_view)
        spec = kv_cache_config.kv_cache_groups[0].kv_cache_spec
        kernel_blocks = runner._kernel_block_sizes
        if kernel_blocks != [spec.block_size]:
            raise InvalidArgumentError(
                f"pipelive_kv: attention uses blocks of {kernel_blocks} tokens inside of blocks of "
                f"{spec.block_size}; set --block-size to {kernel_blocks[0]}"
            )
        held = self.layers.layers
        total, blocks = self.layers.factory.num_layers, kv_cache_config.num_blocks
        # What vLLM's CPU attention calls [blocks, kv_heads, tokens, 2 * head_dim] keeps, for every
        # head of a block, all keys and then all values: our order "hnd". How it orders the tokens
        # in there is its own business, so blocks are copied whole.
        # vLLM's GPU kernels see keys and values of a head side by side; the same holds there.
        kv_spec = KVSpec(
            num_kv_heads=spec.num_kv_heads,
            head_dim=spec.head_size,
            dtype=cast(Any, str(spec.dtype).removeprefix("torch.")),  # checked there
            block_size=spec.block_size,
            order="hnd",
        )
        weights = sum(self.layers.layer_bytes(layer) for layer in held)
        budget = options.budget_bytes or (
            weights + bytes_needed(kv_spec, held, blocks, num_layers=total, page_bytes=_PAGE_BYTES)
        )
        # Whole pages, or the KV that vLLM starts with would not quite fit beside the weights.
        budget = -(-budget // _PAGE_BYTES) * _PAGE_BYTES
        self.pool = KVPool(
            kv_spec,
            num_layers=total,
            layers=held,
            max_blocks=max(blocks, options.max_blocks or 4 * blocks),
            capacity=blocks,
            page_pool=PagePool(budget, page_bytes=_PAGE_BYTES, device=str(runner.device)),
        )
        self._layout = runner.cache_config.get_resolved_kv_cache_layout()
        as_vllm_sees(torch_layer(self.pool, held[0]), self._layout)  # or refuse now
        self._views: dict[int, Any] = {}
        self._stage: Stage | None = None
        self._step: Step | None = None

    def kv_view(self, layer: int) -> Any:
        """A layer's blocks as vLLM's attention wants them; the address never changes."""
        view = self._views.get(layer)
        if view is None:
            view = as_vllm_sees(torch_layer(self.pool, layer), self._layout)
            self._views[layer] = view
        return view

    def kv_tensors(self) -> dict[str, Any]:
        """The KV tensors of the layers held, by the names of their attentions."""
        return {name: self.kv_view(n) for n, name in self.layers.attention_names.items()}

    @property
    def started(self) -> bool:
        """Whether steps carry stamps."""
        return self._stage is not None

    def start(self, control: ControlEndpoint, placement: Placement, rank: int) -> None:
        """Join the control plane; every step carries a stamp from now on."""
        self._stage = Stage(
            pp_rank=rank,
            pp_size=placement.num_stages,
            pool=self.pool,
            placement=placement,
            hooks=self.layers,
            weights=self.layers,
            control=control,
            transport=self._options.transport,
            background_nice=self._options.background_nice,
        )

    def run(self, scheduler_output: Any, forward: Callable[[], Any]) -> Any:
        """Run one step of vLLM's as a step of the stage's."""
        stage = self._stage
        stamp = getattr(scheduler_output, STAMP, None)
        if stage is None or stamp is None:
            raise ProtocolError("a step without a stamp reached a worker that moves layers")
        if scheduler_output.kv_cache_block_copies:
            # It would copy before a gained layer's KV has come, by the number of blocks at start.
            raise ProtocolError(
                f"step {stamp.seq} copies KV blocks, which vLLM does with several KV cache groups "
                "only, and those are not supported"
            )
        if stamp.moves:
            self._remap(dict(stamp.moves))
        step = stage.begin(stamp)
        self._step = step
        try:
            result = forward()
        finally:
            self._step = None
        if self._runner.device.type == "cuda":
            import torch  # noqa: PLC0415

            torch.cuda.current_stream(self._runner.device).synchronize()
        # Now, and on the CPU when the forward pass returns, all of its KV is written.
        stage.end(step)
        return result

    def record(self, slots: Any) -> None:
        """Log the blocks of a step's slot mapping (int64 [tokens], -1 for padding)."""
        if self._step is None:
            return
        blocks = np.unique(slots.cpu().numpy() // self.pool.spec.block_size)
        self._step.record_blocks(blocks[blocks >= 0].astype(np.int64))

    def gate(self) -> None:
        """Wait until the KV of all layers of this step is complete."""
        if self._step is not None:
            for layer in self._step.layers:
                self._step.gate(layer)

    def _remap(self, moves: dict[int, int]) -> None:
        """Rename blocks in what vLLM's worker remembers of running and waiting requests."""
        table = self._runner.input_batch.block_table[0]
        remap(
            moves,
            [ids for request in self._runner.requests.values() for ids in request.block_ids],
            table.block_table.np,
            table.num_blocks_per_row,
        )


def remap(moves: dict[int, int], lists: list[list[int]], rows: Any, counts: Any) -> None:
    """Rename blocks in place; it holds the step up, so without a loop over a table's entries.

    Args:
        moves: new ids by old ones, one or more.
        lists: block ids, each list of its own.
        rows: block ids, integers [rows, columns].
        counts: how many of a row's entries are ids, [rows]; what is behind them stays as it is.
    """
    old = np.fromiter(moves, np.int64)
    new = np.full(int(old.max()) + 1, -1, rows.dtype)  # -1: an id that stays
    new[old] = np.fromiter(moves.values(), np.int64)
    used = rows[:, : counts.max(initial=0)]
    # Most blocks stay: those that move have the highest ids.
    wanted = (used >= old.min()) & (used < len(new))
    wanted &= np.arange(used.shape[1]) < counts[:, None]
    at = np.nonzero(wanted)
    renamed = new[used[at]]
    used[at] = np.where(renamed >= 0, renamed, used[at])
    for ids in lists:
        if not moves.keys().isdisjoint(ids):
            ids[:] = [moves.get(block, block) for block in ids]


def torch_layer(pool: KVPool, layer: int) -> Any:
    """A layer's blocks as a torch tensor: [blocks, kv_heads, 2, tokens, head_dim]."""
    from torch.utils.dlpack import from_dlpack  # noqa: PLC0415

    return from_dlpack(pool.layer(layer))


def as_vllm_sees(blocks: Any, layout: Any) -> Any:
    """Our blocks as vLLM's ``[blocks, kv_heads, tokens, 2 * head_dim]``, in its layout's order.

    Raises:
        InvalidArgumentError: the layout does not keep what belongs to a block together.
    """
    num, heads, _, tokens, dim = blocks.shape
    order = tuple(layout.layer_view_order)
    if order == (0, 1, 2, 3):
        return blocks.view(num, heads, tokens, 2 * dim)
    if order == (0, 2, 1, 3):
        return blocks.view(num, tokens, heads, 2 * dim).transpose(1, 2)
    raise InvalidArgumentError(
        f"pipelive_kv: the KV cache layout is {layout.name}, expected one with whole blocks, such "
        "as LBHNC or LBNHC"
    )


def start_stage(worker: Any, address: str, key: bytes, counts: list[int]) -> dict[str, Any]:
    """Run in every worker once the engine is up; says what the worker holds."""
    from vllm.distributed.parallel_state import get_pp_group  # noqa: PLC0415

    state: WorkerState = worker.model_runner.pipelive
    rank = get_pp_group().rank_in_group
    state.start(
        ControlEndpoint(address, ControlKey.from_bytes(key)), Placement.from_counts(counts), rank
    )
    return memory_of(worker)


def memory_of(worker: Any) -> dict[str, Any]:
    """What a worker holds."""
    state: WorkerState = worker.model_runner.pipelive
    stats = state.pool.page_pool.stats()
    held = state.layers.layers
    return {
        "layers": list(held),
        "capacity": state.pool.capacity,
        "max_blocks": state.pool.max_blocks,
        "budget_bytes": stats.budget_bytes,
        "kv_bytes": stats.used_bytes,
        "kv_held_bytes": stats.held_bytes,
        "weight_bytes": sum(state.layers.layer_bytes(layer) for layer in held),
    }

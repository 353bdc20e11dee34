"""The engine core's side: stamps on the scheduler's output, and the coordinator."""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import msgspec

from pipelive_kv.control import ControlEndpoint, ControlKey
from pipelive_kv.coordinator import Coordinator, MigrationOptions
from pipelive_kv.engines.vllm.blocks import VllmBlocks
from pipelive_kv.engines.vllm.config import KEY, Options
from pipelive_kv.engines.vllm.jobs import Jobs
from pipelive_kv.engines.vllm.worker import STAMP, start_stage
from pipelive_kv.errors import BusyError, InvalidArgumentError, PipeliveError
from pipelive_kv.placement import Placement
from pipelive_kv.scheduler import Scheduler

_MOVED_BYTES_PER_STEP = 32 << 20
"""Bytes that a rank copies at most, where blocks move, before it runs a step: some milliseconds."""


class CoreState:
    """What an ``EngineCore`` holds for the plugin."""

    def __init__(self, core: Any, options: Options) -> None:
        config = core.vllm_config
        counts = _counts(config)
        self._core = core
        self._num_layers = sum(counts)
        self._pp_size = len(counts)
        self._directory: tempfile.TemporaryDirectory[str] | None = None
        record_dir = options.record_dir
        if not record_dir:
            self._directory = tempfile.TemporaryDirectory(prefix="pipelive-vllm-")
            record_dir = self._directory.name
        pool = core.scheduler.kv_cache_manager.block_pool
        self._block_size = block_size = config.cache_config.block_size
        self._blocks = VllmBlocks(
            pool, least=1 + -(-config.model_config.max_model_len // block_size)
        )
        key = ControlKey.generate()
        self._coordinator = Coordinator(
            ControlEndpoint("tcp://127.0.0.1:*", key),
            pp_size=self._pp_size,
            record_dir=Path(record_dir),
        )
        endpoint = self._coordinator.endpoint
        self.jobs = Jobs()
        self.memory = core.model_executor.collective_rpc(
            partial(start_stage, address=endpoint.address, key=key.to_bytes(), counts=counts)
        )
        block_bytes = max(held["kv_bytes"] / held["capacity"] for held in self.memory)
        self._scheduler = Scheduler(
            Placement.from_counts(counts),
            allocator=self._blocks,
            control=endpoint,
            moves_per_step=max(1, int(_MOVED_BYTES_PER_STEP / block_bytes)),
        )
        self._coordinator.await_ready(timeout=30)
        self._join_scheduler(core.scheduler)
        self._scheduler.on_wants_step(self._wake)

    def _join_scheduler(self, scheduler: Any) -> None:
        """Every output of vLLM's scheduler carries a stamp, and every result retires its step."""
        schedule, update = scheduler.schedule, scheduler.update_from_output
        has_requests = scheduler.has_requests

        def stamped_schedule(*args: Any, **kwargs: Any) -> Any:
            stamp = self._scheduler.stamp()
            output = schedule(*args, **kwargs)
            if self.jobs.is_under_way:
                touches, writes = self._blocks_of(output)
                stamp = self._scheduler.narrow(stamp, touches=touches, writes=writes)
            setattr(output, STAMP, stamp)
            return output

        def retiring_update(scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
            result = update(scheduler_output, *args, **kwargs)
            self._scheduler.retired(getattr(scheduler_output, STAMP).seq)
            return result

        scheduler.schedule = stamped_schedule
        scheduler.update_from_output = retiring_update
        # An idle engine runs steps without tokens while a reconfiguration waits for one.
        scheduler.has_requests = lambda: has_requests() or self._scheduler.wants_step

    def _blocks_of(self, output: Any) -> tuple[set[int], set[int]]:
        """The ids of all blocks of a step's requests, and of those that it writes."""
        old = output.scheduled_cached_reqs
        done = dict(zip(old.req_ids, old.num_computed_tokens, strict=True))
        done |= {new.req_id: new.num_computed_tokens for new in output.scheduled_new_reqs}
        touches: set[int] = set()
        writes: set[int] = set()
        for request, count in output.num_scheduled_tokens.items():
            (ids,) = self._core.scheduler.kv_cache_manager.get_block_ids(request)
            first, end = done[request], done[request] + count
            touches.update(ids)
            writes.update(ids[first // self._block_size : -(-end // self._block_size)])
        return touches, writes

    def _wake(self) -> None:
        from vllm.v1.engine import EngineCoreRequestType  # noqa: PLC0415

        self._core.input_queue.put_nowait((EngineCoreRequestType.WAKEUP, None))

    def reconfigure(self, counts: list[int], timeout: float, options: dict[str, Any]) -> None:
        """Start to take the pipeline to ``counts`` layers per rank; returns at once."""
        if (
            len(counts) != self._pp_size
            or not all(type(count) is int and count >= 1 for count in counts)
            or sum(counts) != self._num_layers
        ):
            raise InvalidArgumentError(
                f"layers is {counts}, expected {self._pp_size} numbers of 1 or more that sum up "
                f"to {self._num_layers}"
            )
        try:
            chosen = msgspec.convert(options, MigrationOptions)
        except msgspec.ValidationError as error:
            raise InvalidArgumentError(f"options is {options!r}: {error}") from error
        unknown = set(options) - set(MigrationOptions.__dataclass_fields__)
        if unknown:
            raise InvalidArgumentError(
                f"options has {', '.join(sorted(unknown))}, expected "
                f"{', '.join(MigrationOptions.__dataclass_fields__)}"
            )
        if chosen.weights_from != "source":
            raise InvalidArgumentError(
                f"weights_from is {chosen.weights_from!r}, expected 'source': vLLM packs weights"
            )
        self.jobs.add(
            self._coordinator.reconfigure(
                Placement.from_counts(counts), timeout=timeout, options=chosen
            )
        )

    def status(self, number: int | None = None) -> dict[str, Any]:
        """Where the engine and a reconfiguration stand, by default the last one.

        Raises:
            InvalidArgumentError: there is none of that number, or no longer.
        """
        live = self._blocks.count_live()
        return {
            "layers": list(self._scheduler.placement.counts),
            "epoch": self._scheduler.epoch,
            "step": self._scheduler.next_seq - 1,
            "blocks": {"capacity": self._blocks.capacity, "live": live},
            "job": self.jobs.describe(number),
        }

    def close(self) -> None:
        """Leave the control plane. May be called twice."""
        self._scheduler.close()
        self._coordinator.close()
        if self._directory is not None:
            self._directory.cleanup()


def _counts(config: Any) -> list[int]:
    from vllm.distributed.utils import get_pp_indices  # noqa: PLC0415

    total = config.model_config.get_total_num_hidden_layers()
    size = config.parallel_config.pipeline_parallel_size
    ranges = [get_pp_indices(total, rank, size) for rank in range(size)]
    return [end - start for start, end in ranges]


def _state(core: Any) -> CoreState:
    state: CoreState | None = getattr(core, "pipelive", None)
    if state is None:
        raise InvalidArgumentError(
            f"this engine was started without additional_config.{KEY}, so it cannot move layers"
        )
    return state


# Utility calls: vLLM's clients reach the methods of EngineCore by name. What they answer crosses
# processes, so errors are data.


def pipelive_reconfigure(
    core: Any, counts: list[int], timeout: float = 60.0, options: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Start a reconfiguration; answers the status or what was wrong."""
    try:
        state = _state(core)
        state.reconfigure(list(counts), timeout, options or {})
        return state.status()
    except PipeliveError as error:
        return _refusal(error)


def pipelive_cancel(core: Any) -> dict[str, Any]:
    """Give the reconfiguration under way up, and let its lease go."""
    try:
        state = _state(core)
        state.jobs.cancel()
        return state.status()
    except PipeliveError as error:
        return _refusal(error)


def pipelive_proceed(core: Any) -> dict[str, Any]:
    """Let a paused reconfiguration be decided."""
    try:
        state = _state(core)
        state.jobs.proceed()
        return state.status()
    except PipeliveError as error:
        return _refusal(error)


def pipelive_status(core: Any, number: int | None = None) -> dict[str, Any]:
    """Where the engine stands, and a reconfiguration, by default the last one."""
    try:
        return _state(core).status(number)
    except PipeliveError as error:
        return _refusal(error)


def pipelive_job(core: Any, number: int) -> dict[str, Any]:
    """Where a reconfiguration stands, and no more: for those who wait for it and ask often."""
    try:
        return {"job": _state(core).jobs.describe(number)}
    except PipeliveError as error:
        return _refusal(error)


def pipelive_count(core: Any) -> dict[str, Any]:
    """The status, with those reconfigurations ``ended`` that nobody has counted yet."""
    try:
        state = _state(core)
        return state.status() | {"ended": state.jobs.count()}
    except PipeliveError as error:
        return _refusal(error)


def _refusal(error: PipeliveError) -> dict[str, Any]:
    kind = "busy" if isinstance(error, BusyError) else "invalid"
    if not isinstance(error, BusyError | InvalidArgumentError):
        kind = "failed"
    return {"refused": {"kind": kind, "type": type(error).__name__, "message": str(error)}}

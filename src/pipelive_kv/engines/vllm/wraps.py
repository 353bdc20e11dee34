"""What of vLLM is wrapped; a new release of vLLM is mostly this file's matter.

Each wrapper passes through to what it wraps, and adds a call into this package where the engine was
started with the plugin's options. ``EngineCore`` gets methods called ``pipelive_...``. Written
against vLLM 0.32.0.

Wrapped elsewhere, where the state is that the wrapper needs:

- ``core.py``: ``schedule``, ``update_from_output`` and ``has_requests`` of an engine's scheduler;
- ``layers.py``: ``torch.get_default_dtype``, from the first layer on that is built in another dtype
  than torch's; it answers as ever in all other threads;
- ``plugin.py``: ``EngineArgs.create_engine_config``, on releases where nothing here is installed.

Used without being wrapped: the inside of vLLM's block pool (``blocks.py``), and of its model runner
and its models (``worker.py``, ``layers.py``).
"""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Callable
from typing import Any

from pipelive_kv.engines.vllm import core as core_side
from pipelive_kv.engines.vllm import worker as worker_side
from pipelive_kv.engines.vllm.config import KEY, check_supported, options_of
from pipelive_kv.errors import InvalidArgumentError

_MARK = "_pipelive_wrapped"


def install() -> None:
    """Install all wrappers; a second call changes nothing."""
    from vllm.engine.arg_utils import EngineArgs  # noqa: PLC0415
    from vllm.model_executor.models import utils as model_utils  # noqa: PLC0415
    from vllm.v1.engine.core import EngineCore  # noqa: PLC0415
    from vllm.v1.engine.core_client import SyncMPClient  # noqa: PLC0415
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner  # noqa: PLC0415

    if hasattr(EngineCore.shutdown, _MARK):
        return
    _wrap(EngineArgs, "create_engine_config", _create_engine_config)
    _wrap_everywhere(model_utils, "make_layers", _make_layers)
    _wrap(GPUModelRunner, "initialize_kv_cache_tensors", _initialize_kv_cache_tensors)
    _wrap(GPUModelRunner, "execute_model", _execute_model)
    _wrap(GPUModelRunner, "_get_slot_mappings", _get_slot_mappings)
    _wrap(GPUModelRunner, "_model_forward", _model_forward)
    _wrap(GPUModelRunner, "reload_weights", _reload_weights)
    _wrap(SyncMPClient, "_send_input", _send_input)
    _wrap(EngineCore, "_initialize_kv_caches", _initialize_kv_caches)
    _wrap(EngineCore, "_initialize_effective_attention_block_size", _scheduler_is_made)
    _wrap(EngineCore, "shutdown", _engine_core_shutdown)
    EngineCore.pipelive_reconfigure = core_side.pipelive_reconfigure
    EngineCore.pipelive_cancel = core_side.pipelive_cancel
    EngineCore.pipelive_proceed = core_side.pipelive_proceed
    EngineCore.pipelive_status = core_side.pipelive_status
    EngineCore.pipelive_job = core_side.pipelive_job
    EngineCore.pipelive_count = core_side.pipelive_count
    try:
        from vllm.v1.worker.cpu_model_runner import CPUModelRunner  # noqa: PLC0415
    except ImportError:  # a build of vLLM for another platform
        return
    _wrap(CPUModelRunner, "load_model", _cpu_load_model)


# -- model ----------------------------------------------------------------------------------------


def _make_layers(
    original: Callable[..., Any], num_hidden_layers: int, layer_fn: Any, prefix: str
) -> Any:
    """Keep the function that builds a layer: it is the only way to build one later that is right
    for every model, and vLLM forgets it."""
    start, end, modules = original(num_hidden_layers, layer_fn, prefix=prefix)
    modules.pipelive = worker_side.LayerFactory(num_hidden_layers, layer_fn, prefix)
    return start, end, modules


def _cpu_load_model(original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
    """Make the buffers that a later pipeline rank receives into.

    vLLM makes them in its warm-up, which an eager CPU engine skips: without this, pipeline size 2
    fails at its first step, with or without the plugin's options."""
    result = original(self, *args, **kwargs)
    from vllm.distributed.parallel_state import get_pp_group  # noqa: PLC0415

    if self.intermediate_tensors is None and not get_pp_group().is_first_rank:
        self.intermediate_tensors = self.model.make_empty_intermediate_tensors(
            batch_size=self.max_num_tokens, dtype=self.model_config.dtype, device=self.device
        )
    return result


# -- worker ---------------------------------------------------------------------------------------


def _initialize_kv_cache_tensors(
    original: Callable[..., Any], self: Any, kv_cache_config: Any, *args: Any, **kwargs: Any
) -> Any:
    """Have the KV tensors be views of our pool: what vLLM allocates can neither grow nor move."""
    options = options_of(self.vllm_config)
    if options is None:
        return original(self, kv_cache_config, *args, **kwargs)
    from vllm.v1.worker import gpu_model_runner  # noqa: PLC0415

    allocate = gpu_model_runner.allocate_kv_cache
    state = worker_side.WorkerState(self, options, kv_cache_config)
    gpu_model_runner.allocate_kv_cache = lambda *_args, **_kwargs: state.kv_tensors()
    try:
        result = original(self, kv_cache_config, *args, **kwargs)
    finally:
        gpu_model_runner.allocate_kv_cache = allocate
    self.pipelive = state
    return result


def _execute_model(
    original: Callable[..., Any],
    self: Any,
    scheduler_output: Any,
    intermediate_tensors: Any = None,
) -> Any:
    """A step begins and ends here; its stamp came with the scheduler's output."""
    state: worker_side.WorkerState | None = getattr(self, "pipelive", None)
    if state is None or not state.started:
        return original(self, scheduler_output, intermediate_tensors)
    return state.run(
        scheduler_output, lambda: original(self, scheduler_output, intermediate_tensors)
    )


def _get_slot_mappings(original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
    """The slots that the step writes are known here, and not outside of the model runner."""
    found = original(self, *args, **kwargs)
    state: worker_side.WorkerState | None = getattr(self, "pipelive", None)
    if state is not None and found[0]:
        state.record(found[0][0])
    return found


def _model_forward(original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
    """The last moment before layers run: a gained one waits here for its KV."""
    state: worker_side.WorkerState | None = getattr(self, "pipelive", None)
    if state is not None:
        state.gate()
    return original(self, *args, **kwargs)


def _reload_weights(original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
    """Weights that change at run time are not those that a gained layer is loaded from."""
    if getattr(self, "pipelive", None) is not None:
        raise InvalidArgumentError(
            "reload_weights: this engine moves layers, whose weights come from the checkpoint that "
            f"it was started with; start it without additional_config.{KEY}"
        )
    return original(self, *args, **kwargs)


# -- front end ------------------------------------------------------------------------------------


def _create_engine_config(
    original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any
) -> Any:
    """Refuse what is not supported in the user's own process, before anything is started."""
    config = original(self, *args, **kwargs)
    if options_of(config) is not None:
        check_supported(config)
    return config


def _send_input(original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
    """An ``LLM`` sends from one thread, and its socket must not be used from two: a layer move is
    asked for from another thread than the one that generates."""
    with self.__dict__.setdefault("pipelive_lock", threading.Lock()):
        return original(self, *args, **kwargs)


# -- engine core ----------------------------------------------------------------------------------


def _initialize_kv_caches(original: Callable[..., Any], self: Any, vllm_config: Any) -> Any:
    """Refuse what is not supported, where the configuration did not come from ``EngineArgs``."""
    if options_of(vllm_config) is not None:
        check_supported(vllm_config)
        if not hasattr(self, "input_queue"):
            raise InvalidArgumentError(
                "pipelive_kv: VLLM_ENABLE_V1_MULTIPROCESSING is 0, expected 1: an engine core in "
                "the caller's own process runs no steps while nothing is generated, and layers "
                "change over between two steps"
            )
    return original(self, vllm_config)


def _scheduler_is_made(original: Callable[..., Any], self: Any) -> Any:
    """Take part in the scheduler and connect the workers.

    This method is the first that ``EngineCore.__init__`` calls when the scheduler is there. The
    constructor itself cannot be wrapped: a spawned engine core loads plugins inside of it."""
    result = original(self)
    options = options_of(self.vllm_config)
    if options is not None:
        self.pipelive = core_side.CoreState(self, options)
    return result


def _engine_core_shutdown(original: Callable[..., Any], self: Any) -> Any:
    """Leave the control plane before the workers end."""
    state: core_side.CoreState | None = getattr(self, "pipelive", None)
    if state is not None:
        state.close()
    return original(self)


# -- how ------------------------------------------------------------------------------------------


def _wrap(owner: Any, name: str, wrapper: Callable[..., Any]) -> Any:
    original = getattr(owner, name)

    @functools.wraps(original)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return wrapper(original, *args, **kwargs)

    setattr(wrapped, _MARK, True)
    setattr(owner, name, wrapped)
    return original


def _wrap_everywhere(module: Any, name: str, wrapper: Callable[..., Any]) -> None:
    """Wrap a function also where other modules have imported it by name already."""
    original = _wrap(module, name, wrapper)
    for other in list(sys.modules.values()):
        if getattr(other, "__name__", "").startswith("vllm.") and (
            other.__dict__.get(name) is original
        ):
            setattr(other, name, getattr(module, name))

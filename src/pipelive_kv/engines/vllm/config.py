"""The plugin's options, and what of vLLM it supports."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import msgspec

from pipelive_kv.errors import InvalidArgumentError

TESTED_VERSIONS = ("0.32.0",)
"""The releases of vLLM whose inside the wrappers know."""

KEY = "pipelive"
"""The plugin's place in vLLM's ``additional_config``."""


def untested_release() -> str | None:
    """The release of vLLM that is installed, where it is none of those that were tested."""
    from vllm import __version__  # noqa: PLC0415

    release: str = __version__.split("+")[0]
    return None if release in TESTED_VERSIONS else release


def wrong_release(release: str) -> InvalidArgumentError:
    """The error that says which releases work."""
    return InvalidArgumentError(
        f"pipelive_kv works with vLLM {', '.join(TESTED_VERSIONS)}; this is {release}"
    )


class Options(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """``--additional-config '{"pipelive": {...}}'``; without it the plugin does nothing."""

    budget_bytes: int | None = None
    """Bytes of weights of movable layers and KV on each rank; default: what vLLM starts with."""
    max_blocks: int | None = None
    """Block ids that addresses are reserved for; default: four times those vLLM starts with."""
    record_dir: str = ""
    """Where decisions are recorded; default: a temporary directory."""
    transport: str = "auto"
    """How KV travels between ranks: auto, shm or tcp."""
    untested_gpu: bool = False
    """Let it run on GPUs, where it has never run."""
    background_nice: int = 10
    """How much nicer the threads that load weights and map memory are than those that serve."""


def options_of(vllm_config: Any) -> Options | None:
    """The plugin's options in a ``VllmConfig``; None where it is not asked for.

    Raises:
        InvalidArgumentError: an option is unknown or of another type.
    """
    additional = getattr(vllm_config, "additional_config", None)
    if not isinstance(additional, dict) or KEY not in additional:
        return None
    value = additional[KEY]
    try:
        options = msgspec.convert({} if value in (True, None) else value, Options)
    except msgspec.ValidationError as error:
        raise InvalidArgumentError(f"additional_config.{KEY} is {value!r}: {error}") from error
    for name in ("budget_bytes", "max_blocks"):
        number = getattr(options, name)
        if number is not None and number < 1:
            raise InvalidArgumentError(
                f"additional_config.{KEY}.{name} is {number}, expected 1 or more"
            )
    if not 0 <= options.background_nice <= 19:
        raise InvalidArgumentError(
            f"additional_config.{KEY}.background_nice is {options.background_nice}, "
            "expected 0 to 19"
        )
    return options


def check_supported(vllm_config: Any) -> None:
    """Refuse a configuration that the plugin would not serve correctly.

    Raises:
        InvalidArgumentError: naming every reason.
    """
    options = options_of(vllm_config)
    reasons = list(_reasons(vllm_config, options is not None and options.untested_gpu))
    if reasons:
        raise InvalidArgumentError(
            "pipelive_kv cannot move layers of this vLLM: " + "; ".join(reasons)
        )


def _reasons(config: Any, untested_gpu: bool) -> Iterator[str]:
    from vllm.config import CompilationMode, CUDAGraphMode  # noqa: PLC0415
    from vllm.platforms import current_platform  # noqa: PLC0415

    parallel, model = config.parallel_config, config.model_config
    if current_platform.is_cuda() and not untested_gpu:
        yield (
            "the platform is cuda, where this has never run; the option untested_gpu lets you try"
        )
    elif not (current_platform.is_cpu() or current_platform.is_cuda()):
        yield f"the platform is {current_platform.device_type}, expected cpu"
    if parallel.pipeline_parallel_size < 2:
        yield f"pipeline_parallel_size is {parallel.pipeline_parallel_size}, expected 2 or more"
    for name in (
        "nnodes",
        "tensor_parallel_size",
        "data_parallel_size",
        "prefill_context_parallel_size",
        "decode_context_parallel_size",
    ):
        if getattr(parallel, name, 1) != 1:
            yield f"{name} is {getattr(parallel, name)}, expected 1"
    if parallel.distributed_executor_backend not in ("mp", None):
        yield f"the executor is {parallel.distributed_executor_backend!r}, expected mp"
    if config.compilation_config.mode != CompilationMode.NONE:
        yield "the model is compiled, which bakes its layer range; expected enforce_eager"
    graphs = config.compilation_config.cudagraph_mode
    if graphs not in (None, CUDAGraphMode.NONE):
        yield f"cudagraph_mode is {graphs.name}: graphs bake the layers in; expected enforce_eager"
    if config.use_v2_model_runner:
        yield "Model Runner V2 is on, expected VLLM_USE_V2_MODEL_RUNNER=0"
    if config.scheduler_config.async_scheduling:
        yield "async_scheduling is on"
    if model.runner_type != "generate":
        yield f"the runner is {model.runner_type!r}, expected generate"
    if model.is_multimodal_model:
        yield "the model is multimodal"
    if model.is_moe:
        yield "the model is a mixture of experts, which has never been tried"
    if model.enable_sleep_mode:
        yield "enable_sleep_mode is on: weights and KV that sleep cannot move"
    if model.quantization is not None:
        yield f"the model is quantised ({model.quantization})"
    if config.cache_config.cache_dtype != "auto":
        yield f"kv_cache_dtype is {config.cache_config.cache_dtype!r}, expected auto"
    if config.load_config.load_format not in ("auto", "safetensors"):
        yield f"load_format is {config.load_config.load_format!r}, expected safetensors"
    for name, what in (
        ("lora_config", "LoRA"),
        ("speculative_config", "speculative decoding"),
        ("kv_transfer_config", "a KV connector"),
        ("ec_transfer_config", "an encoder-cache connector"),
        # Gained layers come from the checkpoint.
        ("weight_transfer_config", "the transfer of weights at run time"),
    ):
        if getattr(config, name, None) is not None:
            yield f"{what} is on"


def check_groups(kv_cache_config: Any, attn_groups: Sequence[Sequence[Any]]) -> None:
    """Refuse models whose KV is not one group of full attention, seen by one backend.

    Args:
        kv_cache_config: vLLM's ``KVCacheConfig``.
        attn_groups: the model runner's groups of attention layers, for each KV cache group.

    Raises:
        InvalidArgumentError: naming the groups.
    """
    specs = [group.kv_cache_spec for group in kv_cache_config.kv_cache_groups]
    kinds = [type(spec).__name__ for spec in specs]
    attentions = sum(len(groups) for groups in attn_groups[:1])
    if not kinds or attentions == 0:
        raise InvalidArgumentError(
            "pipelive_kv: this rank has no layers at start, expected at least one on every rank; "
            "see VLLM_PP_LAYER_PARTITION"
        )
    reason = None
    if kinds != ["FullAttentionSpec"]:
        reason = f"its KV cache groups are {kinds}, expected one group of full attention"
    elif any(getattr(specs[0], name, None) for name in ("sliding_window", "attention_chunk_size")):
        # So vLLM calls them where its hybrid KV cache manager is off.
        reason = "some of its layers see a window of tokens only, expected full attention"
    elif attentions != 1:
        reason = f"its layers have {attentions} kinds of attention, expected one"
    if reason is not None:
        raise InvalidArgumentError(f"pipelive_kv cannot move layers of this vLLM: {reason}")

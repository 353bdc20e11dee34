"""What the plugin does not serve is refused before anything starts, with the reason."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest

from pipelive_kv import InvalidArgumentError

pytestmark = pytest.mark.timeout(300)

OTHER = r"works with vLLM 0\.32\.0; this is 0\.99\.0"
FITS = {
    "skip_tokenizer_init": True,
    "pipeline_parallel_size": 2,
    "enforce_eager": True,
    "dtype": "float32",
    "max_model_len": 512,
    "additional_config": {"pipelive": {}},
}


@pytest.fixture
def config(tiny_llama):
    from vllm import EngineArgs

    from pipelive_kv.engines.vllm.plugin import register

    register()  # as vLLM does in every process that it starts

    def make(**settings):
        return EngineArgs(model=str(tiny_llama), **(FITS | settings)).create_engine_config()

    return make


def test_what_fits_is_taken(config):
    assert config().additional_config == {"pipelive": {}}


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"pipeline_parallel_size": 1}, "pipeline_parallel_size is 1"),
        ({"enforce_eager": False}, "compiled"),
        ({"tensor_parallel_size": 2}, "tensor_parallel_size is 2"),
        ({"kv_cache_dtype": "fp8_e5m2"}, "kv_cache_dtype"),
        ({"load_format": "dummy"}, "load_format is 'dummy'"),
        ({"enable_lora": True}, "LoRA"),
    ],
)
def test_what_does_not_fit_is_refused(config, settings, says):
    with pytest.raises(InvalidArgumentError, match=says):
        config(**settings)


def fitting():
    """A ``VllmConfig`` as far as it is looked at, for what no configuration of a tiny Llama has."""
    from vllm.config import CompilationMode, CUDAGraphMode

    return SimpleNamespace(
        parallel_config=SimpleNamespace(
            pipeline_parallel_size=2,
            tensor_parallel_size=1,
            data_parallel_size=1,
            prefill_context_parallel_size=1,
            decode_context_parallel_size=1,
            nnodes=1,
            distributed_executor_backend="mp",
        ),
        model_config=SimpleNamespace(
            runner_type="generate",
            is_multimodal_model=False,
            is_moe=False,
            enable_sleep_mode=False,
            quantization=None,
        ),
        compilation_config=SimpleNamespace(
            mode=CompilationMode.NONE, cudagraph_mode=CUDAGraphMode.NONE
        ),
        cache_config=SimpleNamespace(cache_dtype="auto"),
        load_config=SimpleNamespace(load_format="auto"),
        scheduler_config=SimpleNamespace(async_scheduling=False),
        use_v2_model_runner=False,
        lora_config=None,
        speculative_config=None,
        kv_transfer_config=None,
        ec_transfer_config=None,
        weight_transfer_config=None,
    )


def reasons(config):
    from pipelive_kv.engines.vllm.config import _reasons

    return list(_reasons(config, untested_gpu=False))


def test_the_stand_in_fits():
    assert reasons(fitting()) == []


@pytest.mark.parametrize(
    ("where", "value", "says"),
    [
        ("parallel_config.nnodes", 2, "nnodes is 2, expected 1"),
        ("parallel_config.data_parallel_size", 2, "data_parallel_size is 2, expected 1"),
        ("parallel_config.prefill_context_parallel_size", 2, "prefill_context_parallel_size is 2"),
        ("parallel_config.decode_context_parallel_size", 2, "decode_context_parallel_size is 2"),
        ("parallel_config.distributed_executor_backend", "ray", "the executor is 'ray'"),
        ("compilation_config.cudagraph_mode", "FULL", "cudagraph_mode is FULL"),
        ("compilation_config.cudagraph_mode", "PIECEWISE", "cudagraph_mode is PIECEWISE"),
        ("use_v2_model_runner", True, "Model Runner V2 is on"),
        ("scheduler_config.async_scheduling", True, "async_scheduling is on"),
        ("model_config.runner_type", "pooling", "the runner is 'pooling', expected generate"),
        ("model_config.is_multimodal_model", True, "the model is multimodal"),
        ("model_config.is_moe", True, "the model is a mixture of experts"),
        ("model_config.enable_sleep_mode", True, "enable_sleep_mode is on"),
        ("model_config.quantization", "awq", "the model is quantised (awq)"),
        ("speculative_config", object(), "speculative decoding is on"),
        ("kv_transfer_config", object(), "a KV connector is on"),
        ("ec_transfer_config", object(), "an encoder-cache connector is on"),
        ("weight_transfer_config", object(), "the transfer of weights at run time is on"),
    ],
)
def test_each_thing_that_does_not_fit_has_its_reason(where, value, says):
    from vllm.config import CUDAGraphMode

    config = owner = fitting()
    *path, name = where.split(".")
    for part in path:
        owner = getattr(owner, part)
    setattr(owner, name, CUDAGraphMode[value] if name == "cudagraph_mode" else value)
    (found,) = reasons(config)
    assert found.startswith(says)


def spec_named(kind, **fields):
    return SimpleNamespace(kv_cache_spec=type(kind, (), fields)())


@pytest.mark.parametrize(
    ("groups", "kinds", "says"),
    [
        ([spec_named("FullAttentionSpec"), spec_named("SlidingWindowSpec")], 1, "KV cache groups"),
        ([spec_named("SlidingWindowSpec")], 1, "['SlidingWindowSpec'], expected one group of full"),
        ([spec_named("MambaSpec")], 1, "['MambaSpec'], expected one group of full attention"),
        ([spec_named("FullAttentionSpec", sliding_window=64)], 1, "see a window of tokens only"),
        ([spec_named("FullAttentionSpec", attention_chunk_size=64)], 1, "see a window of tokens"),
        (
            [spec_named("FullAttentionSpec")],
            2,
            "its layers have 2 kinds of attention, expected one",
        ),
        ([], 1, "this rank has no layers at start"),
        ([spec_named("FullAttentionSpec")], 0, "this rank has no layers at start"),
    ],
)
def test_other_kinds_of_kv_are_refused(groups, kinds, says):
    from pipelive_kv.engines.vllm.config import check_groups

    fits = SimpleNamespace(kv_cache_groups=[spec_named("FullAttentionSpec", sliding_window=None)])
    check_groups(fits, [[object()]])
    with pytest.raises(InvalidArgumentError, match=re.escape(says)):
        check_groups(SimpleNamespace(kv_cache_groups=groups), [[object()] * kinds])


@pytest.mark.parametrize(
    ("names", "moe", "says"),
    [
        (["model.layers.0.mlp.experts"], ["model.layers.0.mlp.experts"], "a mixture of experts"),
        (["model.layers.0.cross_attn.attn"], [], "layer 0 has the attentions"),
    ],
)
def test_layers_with_more_than_one_attention_are_refused(names, moe, says):
    from pipelive_kv.engines.vllm.layers import attention_names

    own = ["model.layers.1.self_attn.attn", "model.layers.0.self_attn.attn"]

    def config(names, moe):
        context = dict.fromkeys(names)
        return SimpleNamespace(static_forward_context=context, static_all_moe_layers=moe)

    assert attention_names(config(own, [])) == {0: own[1], 1: own[0]}
    with pytest.raises(InvalidArgumentError, match=says):
        attention_names(config([*own, *names], moe))


def test_weights_are_not_reloaded_under_an_engine_that_moves_layers():
    from pipelive_kv.engines.vllm.wraps import _reload_weights

    asked = []
    _reload_weights(lambda self, path: asked.append(path), SimpleNamespace(), "elsewhere")
    assert asked == ["elsewhere"]
    with pytest.raises(InvalidArgumentError, match="reload_weights: this engine moves layers"):
        _reload_weights(asked.append, SimpleNamespace(pipelive=object()))
    assert asked == ["elsewhere"]


def test_an_engine_core_in_the_caller_s_own_process_is_refused(config):
    from pipelive_kv.engines.vllm.wraps import _initialize_kv_caches

    def started(core, additional):
        return _initialize_kv_caches(lambda *_: "started", core, config(**additional))

    here, elsewhere = SimpleNamespace(), SimpleNamespace(input_queue=object())
    assert started(elsewhere, {}) == "started"
    assert started(here, {"additional_config": {}}) == "started"
    with pytest.raises(InvalidArgumentError, match="VLLM_ENABLE_V1_MULTIPROCESSING is 0"):
        started(here, {})


@pytest.mark.parametrize(
    ("kind", "options", "says"),
    [
        ("cuda", {}, "where this has never run; the option untested_gpu"),
        ("cuda", {"untested_gpu": True}, None),
        ("rocm", {"untested_gpu": True}, "expected cpu"),
    ],
)
def test_gpus_are_taken_by_those_alone_who_ask(config, monkeypatch, kind, options, says):
    from vllm.platforms import current_platform

    from pipelive_kv.engines.vllm.config import check_supported

    made = config(additional_config={"pipelive": options})
    for name in ("is_cpu", "is_cuda"):
        monkeypatch.setattr(current_platform, name, lambda name=name: name == f"is_{kind}")
    if says is None:
        check_supported(made)
    else:
        with pytest.raises(InvalidArgumentError, match=says):
            check_supported(made)


@pytest.mark.parametrize("settings", [{"pipeline_parallel_size": 1}, {"enforce_eager": False}])
def test_an_engine_without_the_option_is_left_alone(config, settings):
    config(additional_config={}, **settings)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"speed": 1}, "speed"),
        ({"budget_bytes": "much"}, "budget_bytes"),
        ({"max_blocks": 0}, "max_blocks is 0"),
        ({"background_nice": 40}, "background_nice is 40"),
        ("yes", "pipelive is 'yes'"),
    ],
)
def test_unknown_options_are_refused(config, options, says):
    with pytest.raises(InvalidArgumentError, match=says):
        config(additional_config={"pipelive": options})


def test_another_release_of_vllm_is_refused_with_those_that_work(config, monkeypatch):
    import vllm
    from vllm.engine.arg_utils import EngineArgs

    from pipelive_kv.engines.vllm.plugin import register

    monkeypatch.setattr(vllm, "__version__", "0.99.0")
    monkeypatch.setattr(EngineArgs, "create_engine_config", EngineArgs.create_engine_config)
    register()
    with pytest.raises(InvalidArgumentError, match=OTHER):
        config()
    config(additional_config={})


def test_on_another_release_servers_start_as_ever_and_calls_say_why_not(monkeypatch):
    import asyncio

    import vllm

    import pipelive_kv.engines.vllm as live
    from pipelive_kv.engines.vllm.plugin import endpoints

    monkeypatch.setattr(vllm, "__version__", "0.99.0")
    plugin = endpoints()
    plugin.attach_router(None)
    asyncio.run(plugin.init_state(object(), None, None))  # a client that none of ours may touch
    with pytest.raises(InvalidArgumentError, match=OTHER):
        live.status(object())
    with pytest.raises(InvalidArgumentError, match=OTHER):
        asyncio.run(live.status_async(object()))

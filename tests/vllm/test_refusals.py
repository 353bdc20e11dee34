"""What the plugin does not serve is refused before anything starts, with the reason."""

from __future__ import annotations

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

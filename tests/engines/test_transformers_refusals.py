"""What the adapter cannot run, it refuses by name before it reads a weight."""

from __future__ import annotations

import pytest
import transformers

from pipelive_kv.engines.transformers import TransformersModel, UnsupportedModelError
from pipelive_kv.placement import Placement
from pipelive_kv.weights import WeightsError

from .pipeline import LocalPipeline

SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}
MLA = {
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
    "n_routed_experts": 2,
    "n_group": 1,
    "topk_group": 1,
    "num_experts_per_tok": 1,
    "moe_intermediate_size": 16,
}
GPT = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64}
OPT = {**SMALL, "ffn_dim": 32, "max_position_embeddings": 64, "word_embed_proj_dim": 32}
NTK = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
LONG = {
    "rope_type": "longrope",
    "factor": 2.0,
    "short_factor": [1.0] * 8,
    "long_factor": [2.0] * 8,
    "rope_theta": 10000.0,
    "original_max_position_embeddings": 64,
}

REFUSED = [
    ("GPT2Config", GPT, "learned positions"),
    ("OPTConfig", OPT, "inner model|learned positions"),
    ("FalconConfig", SMALL, "positions are not rotary|attention interface"),
    ("BloomConfig", {"vocab_size": 64, "hidden_size": 32, "n_layer": 2, "n_head": 2}, "attention"),
    ("DeepseekV3Config", {**SMALL, **MLA}, "latents"),
    ("GptOssConfig", {**SMALL, "num_local_experts": 2}, "sinks"),
    ("T5Config", {"vocab_size": 64, "d_model": 32, "num_layers": 2}, "encoder-decoder"),
    ("Gemma3nTextConfig", {**SMALL, "num_kv_shared_layers": 1}, "share their KV|share"),
    ("LlamaConfig", {**SMALL, "rope_parameters": NTK}, "'dynamic'"),
    ("Phi3Config", {**SMALL, "pad_token_id": 0, "rope_parameters": LONG}, "'longrope'"),
    ("Qwen3NextConfig", SMALL, "linear_attention"),
    (
        "MambaConfig",
        {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2},
        "linear_attention",
    ),
    ("LlavaConfig", {}, "several parts"),
    ("MixtralConfig", {**SMALL, "num_local_experts": 2}, "mixture of experts"),
    (
        "Qwen3MoeConfig",
        {**SMALL, "num_experts": 2, "moe_intermediate_size": 16},
        "mixture of experts",
    ),
    ("StableLmConfig", SMALL, "attention interface"),
]


@pytest.mark.parametrize(("name", "settings", "reason"), REFUSED, ids=[r[0] for r in REFUSED])
def test_refused_by_name(tmp_path, name, settings, reason):
    config = getattr(transformers, name)(**settings)
    config.save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match=reason) as caught:
        TransformersModel(tmp_path)
    assert f"model type '{config.model_type}'" in str(caught.value)


def test_dtype_is_checked(tiny):
    with pytest.raises(ValueError, match="dtype is 'int8'"):
        TransformersModel(tiny("llama"), dtype="int8")


def test_weights_of_another_model_are_refused(tiny, tmp_path):
    """The config says one thing and the weights another."""
    folder = tiny("llama", num_hidden_layers=3)
    other = tiny("qwen3")
    (folder / "config.json").write_bytes((other / "config.json").read_bytes())
    model = TransformersModel(folder)
    with pytest.raises(WeightsError, match=r"layer 0: self_attn\.[kq]_norm\.weight is missing"):
        model.open_weights()


def test_placement_of_another_model_is_refused(tiny):
    pipeline = LocalPipeline(tiny("llama"), (6,))
    with pytest.raises(
        ValueError, match=r"has 6 layers; layers \[6\] of stage 0 were not prepared"
    ):
        pipeline.stages[0].stage.activate(Placement.from_counts([7]))
    assert pipeline.stages[0].stage.active_layers == tuple(range(6))


def test_calling_the_model_outside_a_step_writes_nothing(tiny):
    import torch

    local = LocalPipeline(tiny("llama"), (6,)).stages[0]
    cache = local.stage._cache
    with pytest.raises(ValueError, match="outside a step"):
        cache.append(0, torch.zeros(1, 2, 1, 16), torch.zeros(1, 2, 1, 16))

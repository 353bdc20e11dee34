"""The adapter against stock transformers."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from pipelive_kv.engines.transformers import TransformersModel
from pipelive_kv.models.smollm import gguf_file, smollm2
from pipelive_kv.placement import Placement

from .pipeline import LocalPipeline

FAMILIES = [
    "llama",
    "llama_tied",
    "qwen2",
    "qwen3",
    "mistral",
    "gemma2",
    "gemma3",
    "granite",
    "phi3",
    "olmo2",
    "smollm3",
    "cohere",
    "starcoder2",
]
PROMPT = [(7 * i * i + 3 * i + 11) % 150 + 5 for i in range(37)]


def stock(path):
    return AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, attn_implementation="eager"
    ).eval()


def stock_greedy(model, prompt, count: int) -> list[int]:
    model.generation_config.eos_token_id = None  # the text goes on, as it does in our loop
    out = model.generate(torch.tensor([prompt]), max_new_tokens=count, do_sample=False)
    return out[0, len(prompt) :].tolist()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("counts", [(6,), (2, 0, 4), (0, 6)])
def test_logits_and_tokens_equal_stock(tiny, family, counts):
    path = tiny(family)
    model = stock(path)
    with torch.no_grad():
        expected = model(torch.tensor([PROMPT])).logits[0]
    pipeline = LocalPipeline(path, counts)
    found = torch.cat(
        [pipeline.step([(0, at, PROMPT[at : at + 10])]) for at in range(0, len(PROMPT), 10)]
    )
    assert found.shape == expected.shape
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert pipeline.generate(PROMPT, 20, sequence=1) == stock_greedy(model, PROMPT, 20)


def test_sequences_of_one_step_do_not_see_each_other(tiny):
    path = tiny("qwen3")
    alone = [LocalPipeline(path, (6,)) for _ in range(2)]
    first = alone[0].step([(0, 0, PROMPT[:9])])
    second = alone[1].step([(1, 0, PROMPT[9:20])])
    both = LocalPipeline(path, (3, 3)).step([(0, 0, PROMPT[:9]), (1, 0, PROMPT[9:20])])
    torch.testing.assert_close(both, torch.cat([first, second]), atol=1e-4, rtol=1e-4)


def test_gate_is_called_before_each_layer_in_order(tiny):
    pipeline = LocalPipeline(tiny("llama"), (2, 0, 4))
    pipeline.step([(0, 0, PROMPT[:3])])
    assert pipeline.gated == list(range(6))


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3", "granite", "smollm3"])
def test_layers_move_at_run_time(tiny, family):
    """Layers change stages between two tokens; with them goes the KV, copied by hand here."""
    path = tiny(family)
    expected = LocalPipeline(path, (6,)).generate(PROMPT, 16)
    pipeline = LocalPipeline(path, (3, 3))
    tokens = pipeline.generate(PROMPT, 4)
    for counts in ([5, 1], [0, 6], [6, 0], [3, 3]):
        target = Placement.from_counts(counts)
        for move in pipeline.placement.moves_to(target):
            source, goal = pipeline.stages[move.source], pipeline.stages[move.target]
            goal.gain(move.layers)
            for layer in move.layers:
                torch.from_dlpack(goal.pool.layer(layer)).copy_(
                    torch.from_dlpack(source.pool.layer(layer))
                )
        for local in pipeline.stages:
            local.stage.activate(target)
        for move in pipeline.placement.moves_to(target):
            pipeline.stages[move.source].lose(move.layers)
        pipeline.placement = target
        for _ in range(3):
            at = len(PROMPT) + len(tokens) - 1
            tokens.append(int(pipeline.step([(0, at, tokens[-1:])])[-1].argmax()))
    for rank, local in enumerate(pipeline.stages):
        assert local.stage.active_layers == pipeline.placement.layers_of(rank)
        assert local.arena.layers == pipeline.placement.layers_of(rank)
    assert tokens == expected[: len(tokens)]


def test_parameters_are_views_of_the_arena(tiny):
    pipeline = LocalPipeline(tiny("qwen3"), (6,))
    local = pipeline.stages[0]
    module = local.stage._parts.layers[3]
    region = local.arena.region(3)
    start = region.ctypes.data
    for name, value in module.named_parameters():
        assert start <= value.data_ptr() < start + region.nbytes, name
    before = pipeline.step([(0, 0, PROMPT[:4])])
    region[:] = 0
    assert not torch.equal(before, pipeline.step([(0, 0, PROMPT[:4])]))


def test_layer_in_use_is_not_dropped(tiny):
    local = LocalPipeline(tiny("llama"), (6,)).stages[0]
    with pytest.raises(ValueError, match="layer 2 is in use"):
        local.stage.retire([2])
    assert local.stage.active_layers == tuple(range(6))


def test_wrong_inputs_are_refused(tiny):
    local = LocalPipeline(tiny("llama"), (3, 3)).stages[1]
    with pytest.raises(ValueError, match="expected \\[4, 64\\] on stage 1"):
        local.stage.forward(torch.zeros(4, dtype=torch.int64), torch.arange(4), None)


def test_bfloat16_follows_stock(tiny):
    path = tiny("llama")
    model = AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.bfloat16, attn_implementation="eager"
    )
    with torch.no_grad():
        expected = model(torch.tensor([PROMPT])).logits[0].float()
    found = LocalPipeline(path, (3, 3), dtype="bfloat16").step([(0, 0, PROMPT)]).float()
    assert (found - expected).abs().max() < 0.06 * expected.abs().max()


def test_kv_spec(tiny):
    spec = TransformersModel(tiny("qwen3")).kv_spec(block_size=32)
    assert (spec.num_kv_heads, spec.head_dim, spec.block_size) == (2, 16, 32)
    assert spec.dtype == "float32"


@pytest.mark.model
def test_smollm2_equals_stock():
    try:
        gguf_file()
    except FileNotFoundError as error:
        pytest.skip(str(error))
    path = smollm2()
    model = stock(path)
    prompt = [1, 4093, 198, 1780, 314, 260, 3575, 282, 4649, 47, 2, 198, 1, 520, 9531, 198]
    with torch.no_grad():
        expected = model(torch.tensor([prompt])).logits[0]
    pipeline = LocalPipeline(path, (24, 6))
    torch.testing.assert_close(pipeline.step([(0, 0, prompt)]), expected, atol=1e-4, rtol=1e-4)
    assert pipeline.generate(prompt, 12, sequence=1) == stock_greedy(model, prompt, 12)

"""Tiny models with random weights: the architectures of real ones, made in milliseconds.

Each is saved the way a real checkpoint is (config.json and model.safetensors), so that the tests
go the whole way from a file to tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["TINY_FAMILIES", "tiny_model"]

_COMMON: dict[str, Any] = {
    "vocab_size": 160,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    # Wider than is usual for training: random logits then differ enough that greedy decoding
    # does not hang on ties.
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}

# What each family adds: (config class in transformers, settings).
TINY_FAMILIES: Mapping[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "llama_tied": ("LlamaConfig", {"tie_word_embeddings": True}),
    "qwen2": ("Qwen2Config", {}),  # biases on q, k, v
    "qwen3": ("Qwen3Config", {}),  # norms on q and k
    "mistral": ("MistralConfig", {"sliding_window": 12}),  # a window on every layer
    "gemma2": (  # soft caps, a scale of its own, a window on every second layer, scaled embeddings
        "Gemma2Config",
        {
            "sliding_window": 12,
            "attn_logit_softcapping": 20.0,
            "final_logit_softcapping": 15.0,
            "query_pre_attn_scalar": 24,
            "tie_word_embeddings": True,
        },
    ),
    "gemma3": (  # two ropes
        "Gemma3TextConfig",
        {"sliding_window": 12, "query_pre_attn_scalar": 24, "tie_word_embeddings": True},
    ),
    "granite": (  # multipliers on embeddings, residuals, attention and logits
        "GraniteConfig",
        {
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.7,
            "attention_multiplier": 0.2,
            "logits_scaling": 2.0,
        },
    ),
    "phi3": ("Phi3Config", {"sliding_window": 12}),  # one matrix for q, k and v
    "olmo2": ("Olmo2Config", {}),  # norms behind the blocks
    "smollm3": ("SmolLM3Config", {}),  # layers without rope, chosen by index
    "cohere": ("CohereConfig", {}),  # interleaved rope, attention and MLP side by side
    "stablelm": ("StableLmConfig", {}),  # a rope on part of the head
    "starcoder2": ("Starcoder2Config", {"sliding_window": 12}),
}


def tiny_model(
    family: str, folder: Path | str, *, seed: int = 0, dtype: str = "float32", **settings: Any
) -> Path:
    """Save a tiny model of a family and return its folder.

    Args:
        family: a key of `TINY_FAMILIES`.
        folder: where the model goes; a folder of the family's name is made in it.
        seed: the same seed gives the same weights.
        dtype: of the saved weights: "float32", "bfloat16" or "float16".
        settings: values of the config that replace the family's.
    """
    import torch  # noqa: PLC0415
    import transformers  # noqa: PLC0415

    if family not in TINY_FAMILIES:
        raise ValueError(f"family: {family!r}; expected one of {', '.join(TINY_FAMILIES)}")
    class_name, own = TINY_FAMILIES[family]
    config = getattr(transformers, class_name)(**{**_COMMON, **own, **settings})
    target = Path(folder) / family
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        make: Any = transformers.AutoModelForCausalLM.from_config
        model = make(config)
        with torch.no_grad():
            for name, value in model.named_parameters():
                # Freshly made norms are all ones and biases all zeros; random ones show mistakes.
                if value.ndim == 1:
                    value.add_(torch.randn(value.shape) * (0.1 if "norm" in name else 0.3))
        model.to(getattr(torch, dtype)).save_pretrained(target)
    return target

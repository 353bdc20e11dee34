"""Which Hugging Face models the adapter runs, decided before any weights are read.

What it cannot run correctly it refuses by name. The checks look at the config first, then at the
model's skeleton on the meta device, which costs no memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

from pipelive_kv.errors import InvalidArgumentError

__all__ = ["Skeleton", "UnsupportedModelError", "check_class", "check_config", "examine"]

# Rotary embeddings whose frequencies depend on the longest sequence of a batch: a request's tokens
# would then depend on what else runs.
_BATCH_DEPENDENT_ROPE = ("dynamic", "longrope")
_LAYER_TYPES = ("full_attention", "sliding_attention")


class UnsupportedModelError(InvalidArgumentError):
    """The adapter cannot run this model; the message names the property that stands in the way."""


@dataclass(frozen=True)
class Skeleton:
    """The parts of a causal language model that a pipeline stage handles one by one.

    Attributes:
        model: the model with its head.
        base: what runs the layers.
        base_name: attribute of `model` that holds `base` ("model").
        layers_name: attribute of `base` that holds the layers ("layers").
        embedding_name: attribute of `base` that holds the token embedding.
        norm_name: attribute of `base` that holds the norm behind the layers.
        tied: whether the head shares the embedding's weights.
    """

    model: Any
    base: Any
    base_name: str
    layers_name: str
    embedding_name: str
    norm_name: str
    tied: bool

    @property
    def layers(self) -> nn.ModuleList:
        """The layers; replacing an element replaces the layer that runs."""
        found: nn.ModuleList = getattr(self.base, self.layers_name)
        return found

    @property
    def layer_prefix(self) -> str:
        """What comes before a layer's index in the names of its weights."""
        return f"{self.base_name}.{self.layers_name}."


def check_config(config: Any) -> None:
    """Refuse a config that names something the adapter cannot run.

    Raises:
        UnsupportedModelError: naming the model type and the property.
    """
    for reason in _config_faults(config):
        raise UnsupportedModelError(f"model type {config.model_type!r}: {reason}")


def check_class(config: Any) -> None:
    """Refuse a model whose class cannot be led to a paged pool, before it is made.

    Raises:
        UnsupportedModelError: naming the class and the property.
    """
    found: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if found is None:
        raise UnsupportedModelError(
            f"model type {config.model_type!r}: transformers has no causal language model for it"
        )
    if not getattr(found, "_supports_attention_backend", False):
        raise UnsupportedModelError(
            f"model type {config.model_type!r}: {found.__name__} does not use the attention "
            "interface of transformers"
        )


def _config_faults(config: Any) -> Iterator[str]:
    if config.is_encoder_decoder:
        yield "encoder-decoder models are not supported"
    if config.get_text_config() is not config:
        yield "models with several parts (vision, audio) are not supported; give the text model"
    if not getattr(config, "is_causal", True):
        yield "attention is not causal"
    if getattr(config, "use_bidirectional_attention", None):
        yield "attention is bidirectional"
    if getattr(config, "kv_lora_rank", None):
        yield "it caches latents (multi-head latent attention), not keys and values"
    if getattr(config, "num_kv_shared_layers", None):
        yield "layers share their KV cache"
    if getattr(config, "alibi", None) or getattr(config, "position_embedding_type", None) not in (
        None,
        "rope",
    ):
        yield "positions are not rotary"
    for kind in getattr(config, "layer_types", None) or ():
        if kind not in _LAYER_TYPES:
            yield f"it has layers of type {kind!r}; expected {' or '.join(_LAYER_TYPES)}"
    for kind in _rope_types(getattr(config, "rope_parameters", None)):
        if kind in _BATCH_DEPENDENT_ROPE:
            yield f"rope type {kind!r} makes a request's tokens depend on the others in its batch"


def _rope_types(parameters: Any) -> Iterator[str]:
    if isinstance(parameters, Mapping):
        if isinstance(parameters.get("rope_type"), str):
            yield parameters["rope_type"]
        for value in parameters.values():
            yield from _rope_types(value)


def examine(model: Any) -> Skeleton:
    """Find a model's parts, or refuse it.

    Args:
        model: a causal language model; may be on the meta device.

    Raises:
        UnsupportedModelError: naming the model class and the property.
    """
    try:
        return _examine(model)
    except UnsupportedModelError as error:
        kind = model.config.model_type
        raise UnsupportedModelError(
            f"model type {kind!r}: {type(model).__name__}: {error}"
        ) from None


def _examine(model: Any) -> Skeleton:
    base_name = model.base_model_prefix
    base = getattr(model, base_name, None)
    if base is None or base is model:
        raise UnsupportedModelError(f"it has no inner model {base_name!r}")
    extra = [
        name
        for name, module in base.named_modules()
        if isinstance(module, nn.Embedding) and module is not model.get_input_embeddings()
    ]
    if extra:
        raise UnsupportedModelError(
            f"it has an embedding besides that of the tokens ({extra[0]}): learned positions or "
            "inputs per layer"
        )
    layers_name = _layer_list(model.config, base)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    names = {module: name for name, module in base.named_children()}
    if embedding not in names or head is None:
        raise UnsupportedModelError("it has no token embedding or no head where one is expected")
    others = [
        name
        for name, module in base.named_children()
        if name != layers_name
        and module is not embedding
        and any(True for _ in module.parameters())
    ]
    others += [name for name, _ in base.named_parameters(recurse=False)]
    if len(others) != 1:
        raise UnsupportedModelError(
            "besides layers and embedding exactly one norm is expected, "
            f"found {', '.join(others) or 'none'}"
        )
    _check_layers(getattr(base, layers_name))
    return Skeleton(
        model=model,
        base=base,
        base_name=base_name,
        layers_name=layers_name,
        embedding_name=names[embedding],
        norm_name=others[0],
        tied=bool(model.config.tie_word_embeddings),
    )


def _layer_list(config: Any, base: nn.Module) -> str:
    lists = [name for name, module in base.named_children() if isinstance(module, nn.ModuleList)]
    if len(lists) != 1 or len(getattr(base, lists[0])) != config.num_hidden_layers:
        raise UnsupportedModelError(
            f"one list of {config.num_hidden_layers} layers is expected, "
            f"found {', '.join(lists) or 'none'}"
        )
    return lists[0]


def _check_layers(layers: nn.ModuleList) -> None:
    widths: set[int] = set()
    for index, layer in enumerate(layers):
        for name, _ in layer.named_parameters():
            if "sink" in name:
                raise UnsupportedModelError(f"layer {index} has attention sinks ({name})")
        attention = [
            m for m in layer.modules() if hasattr(m, "is_causal") and hasattr(m, "layer_idx")
        ]
        if len(attention) != 1:
            raise UnsupportedModelError(
                f"layer {index} has {len(attention)} attention modules, expected one"
            )
        module = attention[0]
        if not module.is_causal:
            raise UnsupportedModelError(f"attention of layer {index} is not causal")
        if module.layer_idx != index:
            raise UnsupportedModelError(f"layer {index} uses the KV cache of {module.layer_idx}")
        if getattr(module, "is_kv_shared_layer", False):
            raise UnsupportedModelError(f"layer {index} uses another layer's KV cache")
        widths.add(int(getattr(module, "head_dim", 0)))
    if len(widths) != 1:
        raise UnsupportedModelError(f"layers have unlike head dimensions: {sorted(widths)}")
    for name, _ in layers.named_parameters():
        if "experts" in name.split("."):
            # A checkpoint may hold experts one by one where the model holds them in one tensor,
            # and how many rows an expert gets is up to the batch.
            raise UnsupportedModelError(f"it is a mixture of experts ({name})")

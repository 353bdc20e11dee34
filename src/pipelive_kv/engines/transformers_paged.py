"""The plug-ins that lead a Hugging Face model's KV into a paged pool and its attention out of it.

Nothing in transformers is patched: the model calls our cache's `update`, which appends, and the
attention function that we registered, which reads. Tokens of all requests of a step come in one
row, so the model sees a batch of one and builds no mask.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.masking_utils import AttentionMaskInterface

from pipelive_kv.attention import append, paged_attention
from pipelive_kv.engines.transformers_checks import UnsupportedModelError
from pipelive_kv.errors import InvalidArgumentError

__all__ = ["ATTENTION", "PagedCache", "StepBatch", "register"]

ATTENTION = "pipelive_paged"
"""The name under which the attention function is registered with transformers."""

_CACHE_KEY = "pipelive_cache"  # the keyword that carries the cache through the model's forward
# Keywords that models hand to the attention function and that change nothing here.
_HARMLESS = frozenset(
    {
        "cache_position",
        "is_causal",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "position_ids",
        "return_dict",
        "use_cache",
    }
)


@dataclass(frozen=True)
class StepBatch:
    """What one step's tokens are to attention.

    Attributes:
        slots: int64 [tokens]; where each token's KV goes, -1 for padding.
        block_tables: int32 [seqs, blocks]; padded with 0, the null block.
        seq_lens: int32 [seqs]; tokens of each sequence with those of this step; 0 for padding.
        query_start: int32 [seqs + 1]; first token of each sequence in the step; None: one each.
    """

    slots: torch.Tensor
    block_tables: torch.Tensor
    seq_lens: torch.Tensor
    query_start: torch.Tensor | None = None


class _PagedLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """One layer of the cache: appends to the pool and hands the new keys and values on."""

    is_sliding = False

    def __init__(self, owner: PagedCache, layer: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._owner = owner
        self._layer = layer
        self.is_initialized = True

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing to do: the pool exists already."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self._owner.append(self._layer, key_states, value_states)
        return key_states, value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, 0

    def get_seq_length(self) -> int:
        return 0

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        """Nothing to do: what is cached is the scheduler's business."""


class PagedCache(Cache):
    """A transformers cache over a paged KV pool.

    Args:
        num_layers: layers of the model.
        view: gives the KV of a layer that runs: a `LayerView` or any 5-D DLPack tensor.
    """

    def __init__(self, num_layers: int, view: Callable[[int], Any]) -> None:
        super().__init__(layers=[_PagedLayer(self, layer) for layer in range(num_layers)])
        self._view = view
        self._batch: StepBatch | None = None
        self._appended = -1

    def start(self, batch: StepBatch) -> None:
        """Take the batch that the next forward runs."""
        self._batch = batch
        self._appended = -1

    def finish(self) -> None:
        """Forget the batch: a forward without one is an error, not a write to old slots."""
        self._batch = None

    def append(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> None:
        """Write the new tokens' KV; key and value are [1, kv_heads, tokens, head_dim]."""
        batch = self._current()
        if key.shape != value.shape:
            raise UnsupportedModelError(
                f"layer {layer}: keys are {list(key.shape)} and values {list(value.shape)}; "
                "unlike shapes cannot be cached"
            )
        append(self._view(layer), _rows(key), _rows(value), batch.slots)
        self._appended = layer

    def attend(self, layer: int, query: torch.Tensor, **options: Any) -> torch.Tensor:
        """Attend over the cached tokens; query is [1, heads, tokens, head_dim], so is the result
        but for its order: [1, tokens, heads, head_dim].
        """
        batch = self._current()
        if self._appended != layer:
            raise UnsupportedModelError(
                f"layer {layer} attends without having appended its own keys and values"
            )
        out = paged_attention(
            _rows(query),
            self._view(layer),
            batch.block_tables,
            batch.seq_lens,
            query_start=batch.query_start,
            threads=torch.get_num_threads(),
            **options,
        )
        result: torch.Tensor = out
        return result.unsqueeze(0)

    def _current(self) -> StepBatch:
        if self._batch is None:
            raise InvalidArgumentError("the model was called outside a step; call start() first")
        return self._batch


def _rows(states: torch.Tensor) -> torch.Tensor:
    """[1, heads, tokens, head_dim] -> [tokens, heads, head_dim], without a copy."""
    if states.ndim != 4 or states.shape[0] != 1:
        raise InvalidArgumentError(
            f"states are {list(states.shape)}; expected [1, heads, tokens, head_dim]"
        )
    return states[0].transpose(0, 1)


def _attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Do what the attention interface of transformers asks for, over the paged pool."""
    cache = others.pop(_CACHE_KEY, None)
    name = type(module).__name__
    if not isinstance(cache, PagedCache):
        raise UnsupportedModelError(f"{name} does not hand its keywords to the attention function")
    if attention_mask is not None:
        raise UnsupportedModelError(f"{name} makes an attention mask of its own")
    if dropout:
        raise InvalidArgumentError(f"{name}: dropout is {dropout}; the model is in training mode")
    for keyword, given in others.items():
        if given is not None and keyword not in _HARMLESS:
            raise UnsupportedModelError(f"{name} asks for {keyword!r}, which is not supported")
    out = cache.attend(
        int(module.layer_idx),  # type: ignore[arg-type]
        query,
        scale=float(scaling) if scaling is not None else query.shape[-1] ** -0.5,
        window=int(sliding_window or 0),
        soft_cap=float(softcap or 0.0),
    )
    return out, None


def _no_mask(*args: Any, **kwargs: Any) -> None:
    """Make no dense mask: who sees whom follows from the lengths."""
    return None


def register() -> str:
    """Make the attention function known to transformers and return its name."""
    AttentionInterface.register(ATTENTION, _attention)
    AttentionMaskInterface.register(ATTENTION, _no_mask)
    return ATTENTION


def forward_keywords(cache: PagedCache) -> Mapping[str, Any]:
    """Return the keywords that a model's forward is called with."""
    return {"past_key_values": cache, "use_cache": True, _CACHE_KEY: cache}

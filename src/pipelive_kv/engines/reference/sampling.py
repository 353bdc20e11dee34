"""Drawing tokens, each from its own random number, so that batching changes nothing."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch

from pipelive_kv.engines.reference.messages import Sample

__all__ = ["draw"]


def draw(logits: torch.Tensor, samples: Sequence[Sample]) -> list[int]:
    """Return one token per sample.

    Args:
        logits: [rows, vocab_size].
        samples: which rows, and how. The random number of a sample depends on its request's seed
            and on the token's position alone.
    """
    return [_draw(logits[sample.row], sample) for sample in samples]


def _draw(logits: torch.Tensor, sample: Sample) -> int:
    if sample.temperature <= 0:
        return int(logits.argmax())
    number = random.Random(f"{sample.seed}/{sample.position}").random()
    chances = torch.softmax(logits.double() / sample.temperature, dim=-1).cumsum(0)
    index = int(torch.searchsorted(chances, number * float(chances[-1]), right=True))
    return min(index, logits.shape[0] - 1)

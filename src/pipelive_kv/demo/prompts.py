"""The demo's prompts, as text and as tokens."""

from __future__ import annotations

import random
from collections.abc import Callable
from importlib import resources

MIN_PROMPT_TOKENS = 256


def prompt_texts() -> tuple[str, ...]:
    """The texts that come with the package."""
    content = resources.files("pipelive_kv.demo").joinpath("prompts.txt").read_text("utf-8")
    lines = [line for line in content.splitlines() if not line.startswith("#")]
    texts = "\n".join(lines).split("\n---\n")
    return tuple(text.strip() for text in texts if text.strip())


def prompt_tokens(
    count: int, encode: Callable[[str], list[int]] | None, vocab_size: int
) -> list[tuple[int, ...]]:
    """``count`` prompts of at least :data:`MIN_PROMPT_TOKENS` tokens, no two alike.

    Args:
        count: how many.
        encode: makes tokens of a text; None for a model without a tokenizer, whose prompts are
            then random numbers (the same in every run).
        vocab_size: of the model.
    """
    if encode is None:
        made: list[tuple[int, ...]] = []
        for number in range(count):
            source = random.Random(number)
            length = MIN_PROMPT_TOKENS + source.randrange(48)
            made.append(tuple(source.randrange(3, vocab_size) for _ in range(length)))
        return made
    texts = prompt_texts()
    tokens: list[tuple[int, ...]] = []
    for number in range(count):
        text = texts[number % len(texts)]
        if number >= len(texts):
            text = f"This is request number {number + 1}. {text}"
        found = tuple(encode(text))
        while len(found) < MIN_PROMPT_TOKENS:
            text = f"{text}\n\n{texts[(number + 1) % len(texts)]}"
            found = tuple(encode(text))
        tokens.append(found)
    return tokens

"""What has to be there before an engine runs: the model, prompts as tokens, sizes and a budget."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from pipelive_kv.demo.options import DemoOptions, OptionError
from pipelive_kv.demo.prompts import prompt_tokens
from pipelive_kv.engines.reference import EngineConfig, Request, WrapHooks
from pipelive_kv.engines.transformers import TransformersModel
from pipelive_kv.errors import PipeliveError
from pipelive_kv.models.smollm import smollm2
from pipelive_kv.placement import Placement
from pipelive_kv.plan import StageBudget
from pipelive_kv.weights import layer_offsets

LANES = 2
BLOCK_SIZE = 16
CHUNK = 64
PAGE_BYTES = 2 << 20
DTYPE: Final = "float32"


@dataclass(frozen=True)
class Setup:
    """All that the runs of one demo have in common.

    Attributes:
        name: of the model.
        source: the placement at the start.
        target: the placement after the move.
        requests: in the order of submission; the last one arrives inside the move.
        budget_bytes: of each stage, for weights and KV.
        config: of the engine that starts with ``source``.
        decode: makes text of tokens.
    """

    name: str
    source: Placement
    target: Placement
    requests: tuple[Request, ...]
    budget_bytes: int
    config: EngineConfig
    decode: Callable[[Sequence[int]], str]

    def config_with(
        self, placement: Placement, wrap_hooks: WrapHooks | None = None
    ) -> EngineConfig:
        """The same engine, started with another placement."""
        return dataclasses.replace(self.config, placement=placement, wrap_hooks=wrap_hooks)


def prepare(options: DemoOptions, say: Callable[[str], None]) -> Setup:
    """Get everything ready; ``say`` is told what takes a while.

    Raises:
        OptionError: options that do not fit the model.
    """
    folder = options.model
    if folder is None:
        say("SmolLM2-135M-Instruct in float32 (converted once, then kept in ~/.cache/pipelive_kv)")
        try:
            folder = smollm2()
        except (FileNotFoundError, ImportError) as error:
            raise OptionError(
                f"--model is not given; expected it, or the model the demo brings along: {error}"
            ) from error
    try:
        model = TransformersModel(folder, dtype=DTYPE)
    except (PipeliveError, ValueError, OSError) as error:
        raise OptionError(
            f"--model is {str(folder)!r}; expected a model that can run in stages: {error}"
        ) from error
    source, target = options.placements(model.num_layers)
    encode, decode = _tokenizer(folder)
    prompts = prompt_tokens(options.requests, encode, model.vocab_size)
    requests = tuple(Request(prompt, options.new_tokens, stop_at_eos=False) for prompt in prompts)
    longest = max(len(prompt) for prompt in prompts) + options.new_tokens
    limit = getattr(model.config, "max_position_embeddings", longest)
    if longest > limit:
        raise OptionError(
            f"--new-tokens is {options.new_tokens}; expected at most "
            f"{options.new_tokens - (longest - limit)}, what the model's {limit} positions leave"
        )
    blocks = 1 + sum(
        -(-(len(request.prompt) + request.max_new_tokens) // BLOCK_SIZE) for request in requests
    )
    capacity = blocks + blocks // 4
    budget = _budget(model, source, target, blocks, capacity)
    config = EngineConfig(
        model=folder,
        placement=source,
        dtype=DTYPE,
        block_size=BLOCK_SIZE,
        max_blocks=2 * capacity,
        capacity=capacity,
        budget=budget,
        page_bytes=PAGE_BYTES,
        lanes=LANES,
        max_batch=-(-len(requests) // LANES),
        chunk=CHUNK,
        max_tokens=longest,
        transport=options.transport,
        device=options.device,
    )
    name = "SmolLM2-135M-Instruct" if options.model is None else folder.resolve().name
    return Setup(name, source, target, requests, budget, config, decode)


def _budget(
    model: TransformersModel, source: Placement, target: Placement, blocks: int, capacity: int
) -> int:
    """The least budget that holds the start with ``capacity`` and the move with ``blocks``.

    So the budget is tight: where the layers of both placements together are more than those of
    either, the cache has to shrink while tokens flow.
    """
    spec = model.kv_spec(block_size=BLOCK_SIZE)
    layer = max(layer_offsets(model.layer_layout(i))[1] for i in range(model.num_layers))
    layer = -(-layer // PAGE_BYTES) * PAGE_BYTES
    block = 2 * spec.num_kv_heads * spec.head_dim * spec.block_size * 4
    rule = StageBudget(0, layer, block, page_bytes=PAGE_BYTES)

    def needed(count: int, resident: int) -> int:
        return count * layer + rule.bytes_needed(count, resident)

    stages = range(source.num_stages)
    at_rest = max(needed(len(source.layers_of(rank)), capacity) for rank in stages)
    moving = max(needed(len(source.union_with(target, rank)), blocks) for rank in stages)
    return max(at_rest, moving)


def _tokenizer(
    folder: Path,
) -> tuple[Callable[[str], list[int]] | None, Callable[[Sequence[int]], str]]:
    """How to make tokens of a prompt and text of tokens; prompts go in as a chat if they can."""
    from transformers import AutoTokenizer  # noqa: PLC0415

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError):
        return None, lambda tokens: " ".join(map(str, tokens))

    is_chat = bool(tokenizer.chat_template)

    def encode(text: str) -> list[int]:
        if is_chat:
            chat = [{"role": "user", "content": text}]
            text = str(
                tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
            )
        return list(tokenizer(text, add_special_tokens=not is_chat)["input_ids"])

    def decode(tokens: Sequence[int]) -> str:
        return str(tokenizer.decode(list(tokens), skip_special_tokens=True))

    return encode, decode

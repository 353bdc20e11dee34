"""Runs that tests and the example compare: the same requests with and without moves."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pipelive_kv.engines.vllm as live


def start(model: Path, *, plugin: bool = True, options: dict[str, Any] | None = None, **settings):
    """An ``LLM`` of two pipeline ranks; ``plugin=False`` is stock vLLM."""
    import os

    from vllm import LLM

    os.environ.setdefault("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")  # collective_rpc of functions
    defaults = {
        "skip_tokenizer_init": True,
        "pipeline_parallel_size": 2,
        "enforce_eager": True,
        "dtype": "float32",
        "max_model_len": 512,
        "max_num_seqs": 8,
        "block_size": 32,
        "enable_prefix_caching": True,
    }
    if plugin:
        defaults["additional_config"] = {"pipelive": options or {}}
    return LLM(model=str(model), **(defaults | settings))


def prompts(count: int, *, shared: int = 0, seed: int = 0) -> list[list[int]]:
    """Token ids; the first ``shared`` ones are the same in every prompt."""
    head = [5 + (11 * i) % 140 for i in range(shared)]
    return [
        head + [5 + (7 * i + 3 * j + seed) % 140 for j in range(10 + 3 * i)] for i in range(count)
    ]


def generate(llm: Any, wanted: list[list[int]], tokens: int) -> list[list[int]]:
    from vllm.inputs import TokensPrompt

    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
    found = llm.generate(
        [TokensPrompt(prompt_token_ids=ids) for ids in wanted], sampling, use_tqdm=False
    )
    return [list(request.outputs[0].token_ids) for request in found]


@dataclass
class Mover:
    """Carries out a list of splits, one after the other, in a thread of its own."""

    llm: Any
    splits: list[list[int]]
    options: dict[str, Any] = field(default_factory=dict)
    reports: list[dict[str, Any]] = field(default_factory=list)
    errors: list[Exception] = field(default_factory=list)

    def __enter__(self) -> Mover:
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.join(timeout=240)
        assert not self._thread.is_alive()

    def _run(self) -> None:
        for split in self.splits:
            try:
                self.reports.append(live.reconfigure(self.llm, split, **self.options))
            except Exception as error:
                self.errors.append(error)


def while_generating(llm: Any, wanted: list[list[int]], tokens: int, act: Callable[[], Any]):
    """``act()`` in another thread while the requests run; (tokens, what it returned or raised)."""
    outcome: list[Any] = []

    def run() -> None:
        try:
            outcome.append(act())
        except Exception as error:
            outcome.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    found = generate(llm, wanted, tokens)
    thread.join(timeout=240)
    assert not thread.is_alive()
    return found, outcome[0]

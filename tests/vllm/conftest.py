"""Tests inside vLLM: skipped where it is not installed, see `make test-vllm`."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    missing = importlib.util.find_spec("vllm") is None
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.vllm)
            if missing:
                item.add_marker(
                    pytest.mark.skip(reason="vLLM is not installed; `make test-vllm` brings it")
                )


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of 6 layers whose heads are large enough for vLLM's CPU attention.

    Its tokenizer calls token 7 "t7", so texts are as telling as tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from pipelive_kv.models.tiny import tiny_model

    found = tiny_model("llama", tmp_path_factory.mktemp("model"), head_dim=32, vocab_size=512)
    words = models.WordLevel({f"t{number}": number for number in range(512)}, unk_token="t0")
    tokenizer = Tokenizer(words)
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="t0").save_pretrained(found)
    return found


@pytest.fixture(scope="session", autouse=True)
def vllm_environment() -> Iterator[None]:
    patch = pytest.MonkeyPatch()
    for name, value in {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "0|1" if (os.cpu_count() or 1) > 1 else "nobind",
        "VLLM_PLUGINS": "pipelive",
        "VLLM_HOST_IP": "127.0.0.1",
        "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",  # collective_rpc of functions
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
    }.items():
        patch.setenv(name, value)
    yield
    patch.undo()

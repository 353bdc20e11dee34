"""Other models and dtypes than those of test_moves.py, each with a move each way."""

from __future__ import annotations

import pytest

from pipelive_kv.models.tiny import tiny_model
from tests.vllm.runs import Engine, prompts

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.mark.parametrize(
    ("family", "dtype"), [("qwen3", "bfloat16"), ("qwen2", "float32"), ("llama", "float16")]
)
def test_tokens_are_the_same(family, dtype, tmp_path):
    """One request alone: with several, rounding to two bytes follows how they share a batch."""
    model = tiny_model(family, tmp_path, head_dim=32, hidden_size=128, vocab_size=512)
    options = {"budget_bytes": 64 << 20}  # pages are large beside such layers
    engine = Engine(model, options=options, dtype=dtype, num_gpu_blocks_override=64)
    try:
        wanted = prompts(1, length=40)
        expected = engine.unmoved(wanted, 150)
        stream = engine.submit(wanted[0], 150)
        stream.await_tokens(5)
        for split in ([5, 1], [2, 4]):
            report = engine.reconfigure(split, verify=True)
            assert report["to"] == split
            assert report["bytes_moved"] > 0
        assert stream.result() == expected[0]
        assert engine.generate(wanted, 150) == expected
    finally:
        engine.close()

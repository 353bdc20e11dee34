"""The calls for those who hold an ``LLM``, from another thread than the one that generates."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

import pipelive_kv.engines.vllm as live
from pipelive_kv import InvalidArgumentError
from tests.vllm.runs import prompts, until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def llm(tiny_llama):
    from vllm import LLM

    found = LLM(
        model=str(tiny_llama),
        skip_tokenizer_init=True,
        pipeline_parallel_size=2,
        enforce_eager=True,
        dtype="float32",
        max_model_len=512,
        block_size=32,
        num_gpu_blocks_override=200,
        additional_config={"pipelive": {}},
    )
    yield found
    found.llm_engine.engine_core.shutdown()


def generate(llm, wanted, tokens):
    from vllm import SamplingParams
    from vllm.inputs import TokensPrompt

    sampling = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
    found = llm.generate(
        [TokensPrompt(prompt_token_ids=ids) for ids in wanted], sampling, use_tqdm=False
    )
    return [list(request.outputs[0].token_ids) for request in found]


def test_an_llm_moves_while_it_generates(llm):
    wanted = prompts(4)
    expected = generate(llm, wanted, 150)
    with ThreadPoolExecutor(1) as pool:
        for split in ([5, 1], [2, 4]):
            moving = pool.submit(live.reconfigure, llm, split)
            assert generate(llm, wanted, 150) == expected
            assert moving.result(240)["to"] == split
    assert live.status(llm)["layers"] == [2, 4]
    with pytest.raises(InvalidArgumentError, match="layers is"):
        live.reconfigure(llm, [6, 0])
    live.reconfigure(llm, [3, 3], wait=False, pause=True)
    live.cancel(llm)
    until(lambda: live.status(llm)["job"]["final"])
    assert live.status(llm)["layers"] == [2, 4]
    live.reconfigure(llm, [3, 3], wait=False, pause=True)
    live.proceed(llm)
    until(lambda: live.status(llm)["job"]["final"])
    assert live.status(llm)["layers"] == [3, 3]
    assert generate(llm, wanted, 150) == expected

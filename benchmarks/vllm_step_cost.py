"""What the idle plugin costs a step of vLLM's, in processor time of the threads that serve.

That is what tells on a machine which other work shares: it counts while the thread runs, whatever
it waits for. The engine core's part is taken in the caller's process, the workers' in theirs::

    scripts/vllm_env.sh python benchmarks/vllm_step_cost.py --model PATH --out FILE
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def timed(owner: Any, name: str, spent: list[float]) -> None:
    """Replace a method by one that notes its thread's processor time, in seconds."""
    original: Callable[..., Any] = getattr(owner, name)

    def measured(*args: Any, **kwargs: Any) -> Any:
        begin = time.thread_time()
        try:
            return original(*args, **kwargs)
        finally:
            spent.append(time.thread_time() - begin)

    setattr(owner, name, measured)


def start_measuring(worker: Any) -> None:
    """In a worker: time what a step does for the plugin, and the whole step."""
    state = worker.model_runner.pipelive
    state.spent = {"plugin": [], "step": []}
    for owner, name in (
        (state._stage, "begin"),
        (state._stage, "end"),
        (state, "record"),
        (state, "gate"),
    ):
        timed(owner, name, state.spent["plugin"])
    timed(state, "run", state.spent["step"])


def measured(worker: Any) -> dict[str, list[float]]:
    found: dict[str, list[float]] = worker.model_runner.pipelive.spent
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--model", type=Path, required=True, help="a folder with a checkpoint")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    os.environ |= {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine core in this process
        "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",  # collective_rpc of functions
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "0|1",
        "VLLM_HOST_IP": "127.0.0.1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
    }
    from vllm import LLM, SamplingParams  # noqa: PLC0415
    from vllm.inputs import TokensPrompt  # noqa: PLC0415
    from vllm.v1.engine.core import EngineCore  # noqa: PLC0415

    # The plugin refuses an engine core in the caller's process, which could not change its split.
    # Here it is only to be idle, and is told that it is in a process of its own.
    EngineCore.input_queue = None

    llm = LLM(
        model=str(arguments.model),
        skip_tokenizer_init=True,
        pipeline_parallel_size=2,
        enforce_eager=True,
        dtype=arguments.dtype,
        max_model_len=512,
        block_size=32,
        additional_config={"pipelive": {}},
    )
    prompts = [
        TokensPrompt(prompt_token_ids=[5 + (7 * i + 3 * j) % 140 for j in range(24)])
        for i in range(arguments.streams)
    ]

    def generate(tokens: int) -> None:
        sampling = SamplingParams(max_tokens=tokens, ignore_eos=True, detokenize=False)
        llm.generate(prompts, sampling, use_tqdm=False)

    generate(8)
    scheduler: Any = llm.llm_engine.engine_core
    core: list[float] = []
    timed(scheduler.engine_core.pipelive._scheduler, "stamp", core)
    timed(scheduler.engine_core.pipelive._scheduler, "retired", core)
    llm.collective_rpc(start_measuring)
    generate(arguments.tokens)
    workers = llm.collective_rpc(measured)
    steps = [len(worker["step"]) for worker in workers]
    found = {
        "steps": steps,
        "core_us_per_step": sum(core) / steps[0] * 1e6,
        "worker_us_per_step": [
            sum(worker["plugin"]) / count * 1e6
            for worker, count in zip(workers, steps, strict=True)
        ],
        "step_ms_of_processor_time": [
            statistics.median(worker["step"]) * 1e3 for worker in workers
        ],
        "date": datetime.date.today().isoformat(),
    }
    print(json.dumps(found, indent=1))
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()

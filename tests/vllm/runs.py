"""An engine for tests, and requests whose tokens are compared with and without moves."""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
import time
import uuid
from pathlib import Path
from typing import Any

import pipelive_kv.engines.vllm as live
from pipelive_kv.protocol import Phase

PATIENCE_S = 480.0
"""How long anything may take here: a machine under load is no failure."""


class Stream:
    """One request under way; its tokens so far, and all of them."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.task: concurrent.futures.Future[None] | None = None

    def result(self) -> list[int]:
        assert self.task is not None
        self.task.result(PATIENCE_S)
        return self.tokens

    def await_tokens(self, count: int) -> None:
        """Wait until it has that many tokens; its end is an error."""
        assert self.task is not None
        until(lambda: len(self.tokens) >= count or self.task.done())
        assert len(self.tokens) >= count, "the request ended too early"


class Engine:
    """An ``AsyncLLM`` of two pipeline ranks in a thread of its own, called from this one."""

    def __init__(self, model: Path, *, options: dict[str, Any] | None = None, **settings: Any):
        from vllm import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        defaults = {
            "skip_tokenizer_init": True,
            "pipeline_parallel_size": 2,
            "enforce_eager": True,
            "dtype": "float32",
            "max_model_len": 512,
            "block_size": 32,
            "additional_config": {"pipelive": options or {}},
        }
        arguments = AsyncEngineArgs(model=str(model), **(defaults | settings))
        self._unmoved: dict[tuple[str, int], list[list[int]]] = {}
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()

        async def start() -> Any:
            return AsyncLLM.from_engine_args(arguments)

        self.llm = self.wait(start())

    def wait(self, coroutine: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(PATIENCE_S)

    def close(self) -> None:
        async def stop() -> None:
            self.llm.shutdown()

        self.wait(stop())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=60)
        del self.llm  # while the interpreter lives, for its own sake

    # -- requests ---------------------------------------------------------------------------------

    def submit(self, prompt: list[int], tokens: int) -> Stream:
        from vllm import SamplingParams
        from vllm.inputs import TokensPrompt
        from vllm.sampling_params import RequestOutputKind

        stream = Stream()
        sampling = SamplingParams(
            temperature=0,
            max_tokens=tokens,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )

        async def run() -> None:
            request = TokensPrompt(prompt_token_ids=prompt)
            async for output in self.llm.generate(request, sampling, uuid.uuid4().hex):
                stream.tokens += output.outputs[0].token_ids

        stream.task = asyncio.run_coroutine_threadsafe(run(), self._loop)
        return stream

    def generate(self, wanted: list[list[int]], tokens: int) -> list[list[int]]:
        """All at once."""
        return [stream.result() for stream in [self.submit(prompt, tokens) for prompt in wanted]]

    def unmoved(self, wanted: list[list[int]], tokens: int) -> list[list[int]]:
        """Tokens without a move; again must give the same, or nothing is shown."""
        key = (str(wanted), tokens)
        if key not in self._unmoved:
            self._unmoved[key] = self.generate(wanted, tokens)
            assert self._unmoved[key] == self.generate(wanted, tokens), (
                "vLLM is not bit-stable here, so moved runs cannot be compared"
            )
        return self._unmoved[key]

    # -- moves ------------------------------------------------------------------------------------

    def status(self) -> dict[str, Any]:
        return self.wait(live.status_async(self.llm))

    def reconfigure(self, layers: list[int], **settings: Any) -> dict[str, Any]:
        return self.wait(live.reconfigure_async(self.llm, layers, **settings))

    def begin(self, layers: list[int], **settings: Any) -> None:
        self.reconfigure(layers, wait=False, timeout=120, **settings)

    def cancel(self) -> None:
        self.wait(live.cancel_async(self.llm))

    def proceed(self) -> None:
        self.wait(live.proceed_async(self.llm))

    def ended(self) -> dict[str, Any]:
        """The status once the reconfiguration under way has ended."""
        until(lambda: self.status()["job"]["final"])
        return self.status()

    def lease_ended(self) -> None:
        """Wait until other moves than the way back may begin."""
        until(lambda: (self.status()["job"]["lease"] or {"final": True})["final"])

    def await_phase(self, phase: str, *, held: bool = False) -> str:
        """Wait until the reconfiguration is in that phase or past it; the one it is in.

        With ``held``, it stays there until it is told to go on: another one is an error.
        """
        order = [found.value for found in Phase]  # in the protocol's order
        found = [""]

        def there() -> bool:
            job = self.status()["job"]
            found[0] = job["phase"]
            return job["final"] or order.index(found[0]) >= order.index(phase)

        until(there)
        if held:
            assert found[0] == phase, self.status()["job"]
        return found[0]

    def on_workers(self, function: Any) -> list[Any]:
        return self.wait(self.llm.collective_rpc(function))

    def memory(self) -> list[dict[str, Any]]:
        from pipelive_kv.engines.vllm.worker import memory_of

        return self.on_workers(memory_of)

    def elsewhere(self) -> list[int]:
        """A split that moves two layers or more."""
        return [2, 4] if self.status()["layers"][0] > 3 else [5, 1]


def until(condition: Any) -> None:
    end = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.002)


def prompts(count: int, *, shared: int = 0, seed: int = 0, length: int = 10) -> list[list[int]]:
    """Token ids; the first ``shared`` ones are the same in every prompt."""
    head = [5 + (11 * i + seed) % 140 for i in range(shared)]
    return [
        head + [5 + (7 * i + 3 * j + seed) % 140 for j in range(length + 3 * i)]
        for i in range(count)
    ]

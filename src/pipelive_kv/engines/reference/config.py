"""What a caller tells the engine and gets back."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias

from pipelive_kv.errors import InvalidArgumentError, PipeliveError
from pipelive_kv.placement import Placement

if TYPE_CHECKING:
    from pipelive_kv.kv import KVPool
    from pipelive_kv.stage import EngineHooks

WrapHooks: TypeAlias = "Callable[[EngineHooks, KVPool], EngineHooks]"

__all__ = [
    "EngineConfig",
    "EngineFailedError",
    "Request",
    "RequestResult",
    "StageTimes",
    "StepRecord",
    "WrapHooks",
]


class EngineFailedError(PipeliveError):
    """A stage process died or raised; the message names its rank and says how."""


@dataclass(frozen=True)
class EngineConfig:
    """How an engine runs.

    Attributes:
        model: folder of a Hugging Face causal language model with safetensors weights.
        placement: which stage holds which layers at the start.
        dtype: of weights, activations and KV.
        device: "cpu", "cuda:1" for all stages, or "cuda": the stages take the GPUs in turn.
        block_size: tokens of a block.
        max_blocks: block ids that addresses are reserved for.
        capacity: block ids that are resident at the start; None: all.
        budget: bytes that weights of layers and KV of one stage may take: a number or "4GiB".
        page_bytes: unit in which memory is mapped.
        stack: layers whose blocks lie side by side.
        lanes: micro-batches in flight; step `seq` runs lane `seq % lanes`.
        max_batch: requests of one lane; a decode step always has this many rows.
        chunk: tokens of a prefill step, always.
        chunks_in_flight: chunks of a lane's prompts under way at once; with more than one a long
            prompt keeps all stages busy.
        max_tokens: of a request, prompt and output together.
        threads: of each stage process for computing.
        reconfigurable: whether `Engine.reconfigure` may be called.
        preempt: whether requests may be preempted, and computed anew later, where their blocks
            stand against a reconfiguration; otherwise it is refused.
        transport: how KV travels between stages: "auto", "shm" or "tcp".
        start_method: of the stage processes. "forkserver" imports torch once for all engines of a
            process, "spawn" once per stage.
        record_dir: where decisions are recorded; None: in a folder that goes with the engine.
        start_timeout: seconds for all stages to come up.
        step_timeout: seconds for a step to come back.
        wrap_hooks: called in every stage process with the engine's hooks and the stage's pool; what
            it returns is told of reconfigurations in their place. To measure, or to make faults. A
            function that can be imported by its name.
    """

    model: Path | str
    placement: Placement
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    device: str = "cpu"
    block_size: int = 16
    max_blocks: int = 256
    capacity: int | None = None
    budget: int | str = "4GiB"
    page_bytes: int = 2 << 20
    stack: int = 1
    lanes: int = 2
    max_batch: int = 4
    chunk: int = 32
    chunks_in_flight: int = 1
    max_tokens: int = 1024
    threads: int = 1
    reconfigurable: bool = True
    preempt: bool = False
    transport: str = "auto"
    start_method: Literal["forkserver", "spawn"] = "forkserver"
    record_dir: Path | str | None = None
    start_timeout: float = 120.0
    step_timeout: float = 60.0
    wrap_hooks: WrapHooks | None = None

    def __post_init__(self) -> None:
        if not re.fullmatch(r"cpu|cuda(:\d+)?", self.device):
            raise InvalidArgumentError(
                f"device is {self.device!r}; expected 'cpu', 'cuda' or a GPU such as 'cuda:0'"
            )
        for name in (
            *("block_size", "lanes", "max_batch", "chunk", "chunks_in_flight"),
            *("max_tokens", "threads"),
        ):
            if getattr(self, name) < 1:
                raise InvalidArgumentError(f"{name} is {getattr(self, name)}; expected at least 1")
        if self.max_blocks < 2 or not 2 <= self.first_capacity <= self.max_blocks:
            raise InvalidArgumentError(
                f"capacity is {self.capacity} and max_blocks {self.max_blocks}; "
                "expected 2 <= capacity <= max_blocks"
            )

    @property
    def first_capacity(self) -> int:
        """Block ids that are resident at the start."""
        return self.max_blocks if self.capacity is None else self.capacity


@dataclass(frozen=True)
class Request:
    """One prompt.

    Attributes:
        prompt: token ids.
        max_new_tokens: of the output.
        arrival_step: the request is not seen by steps before this one.
        temperature: 0 takes the likeliest token.
        seed: with a temperature, the same seed gives the same text, whatever else runs.
        stop_at_eos: whether the model's end token ends the text.
    """

    prompt: tuple[int, ...]
    max_new_tokens: int
    arrival_step: int = 0
    temperature: float = 0.0
    seed: int = 0
    stop_at_eos: bool = True


@dataclass
class RequestResult:
    """What became of a request; times are `time.monotonic()` seconds.

    Attributes:
        request_id: as `Engine.submit` returned it.
        tokens: of the output, the end token included.
        arrival: when the request was there and its arrival step was reached.
        token_times: when each token came back.
        finish: "length" or "eos"; empty while it runs.
    """

    request_id: int
    tokens: list[int] = field(default_factory=list)
    arrival: float = 0.0
    token_times: list[float] = field(default_factory=list)
    finish: Literal["", "length", "eos"] = ""

    @property
    def ttft(self) -> float:
        """Seconds from arrival to the first token."""
        return self.token_times[0] - self.arrival

    @property
    def tpot(self) -> float:
        """Mean seconds between two tokens; 0 for a single token."""
        gaps = len(self.token_times) - 1
        return (self.token_times[-1] - self.token_times[0]) / gaps if gaps > 0 else 0.0

    @property
    def gaps(self) -> list[float]:
        """Seconds between each token and the one before it."""
        return [b - a for a, b in zip(self.token_times, self.token_times[1:], strict=False)]


@dataclass(frozen=True)
class StageTimes:
    """One step on one stage; `time.monotonic()` seconds, comparable between processes.

    Attributes:
        rank: of the stage.
        begin: the step's message was there.
        start: its inputs were there; computing starts.
        end: its results were there.
        gate: seconds of it that were spent waiting at gates.
        num_layers: layers that ran.
    """

    rank: int
    begin: float
    start: float
    end: float
    gate: float
    num_layers: int


@dataclass(frozen=True)
class StepRecord:
    """One finished step.

    Attributes:
        seq: its number.
        epoch: the placement that it ran under.
        kind: "prefill", "decode" or "empty".
        issued: when its message went out.
        done: when every stage had reported it.
        rows: rows of the batch that belong to requests.
        stages: its times on each stage, by rank.
    """

    seq: int
    epoch: int
    kind: str
    issued: float
    done: float
    rows: int
    stages: tuple[StageTimes, ...]

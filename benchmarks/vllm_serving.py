"""vLLM with and without the plugin: speed with it idle, and the gaps between tokens around moves.

Engines of stock vLLM and of vLLM with the plugin take turns (``--turns`` of each), each in a
process of its own; the plugin's move layers after their measurements::

    scripts/vllm_env.sh python benchmarks/vllm_serving.py --out docs/benchmarks/vllm.json

Speed is tokens per second of all streams together, from the first token of the last stream to the
last of the first. A *gap* is the time between two tokens of one stream; it is told in units of the
median gap of the same streams outside of moves.
"""

from __future__ import annotations

import argparse
import asyncio
import datetime
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

MARK = "## result: "  # vLLM logs to the same stream
PLACES = ["the sea", "a forest", "a railway", "a library", "a desert", "a harbour", "a city", "ice"]


class Run:
    """Streams that ran together: when each token came, on the monotonic clock in seconds."""

    def __init__(self, streams: int) -> None:
        self.times: list[list[float]] = [[] for _ in range(streams)]
        self.tokens: list[list[int]] = [[] for _ in range(streams)]

    @property
    def speed(self) -> float:
        begin = max(times[0] for times in self.times)
        end = min(times[-1] for times in self.times)
        count = sum(begin < at <= end for times in self.times for at in times)
        return count / (end - begin)

    def gaps(self) -> list[tuple[float, float]]:
        return [pair for times in self.times for pair in itertools.pairwise(times[1:])]


async def generate(llm: Any, streams: int, tokens: int, number: str) -> Run:
    from vllm import SamplingParams  # noqa: PLC0415
    from vllm.sampling_params import RequestOutputKind  # noqa: PLC0415

    run = Run(streams)
    sampling = SamplingParams(
        temperature=0, max_tokens=tokens, ignore_eos=True, output_kind=RequestOutputKind.DELTA
    )

    async def one(index: int) -> None:
        prompt = f"A short story about {PLACES[index % len(PLACES)]}, part {index}."
        async for output in llm.generate(prompt, sampling, f"{number}-{index}"):
            now = time.monotonic()
            for token in output.outputs[0].token_ids:
                run.times[index].append(now)
                run.tokens[index].append(token)

    await asyncio.gather(*(one(index) for index in range(streams)))
    return run


async def moved(llm: Any, arguments: argparse.Namespace, found: dict[str, Any]) -> list[list[int]]:
    """One run with a move there and back; adds its figures to ``found``."""
    import pipelive_kv.engines.vllm as live  # noqa: PLC0415

    task = asyncio.ensure_future(generate(llm, arguments.streams, arguments.tokens, "moved"))
    spans: list[tuple[float, float, float, float]] = []
    for split in (arguments.other, arguments.split):
        await asyncio.sleep(1.0)
        begin = time.monotonic()
        job = await live.reconfigure_async(llm, split, timeout=300)
        spans.append((begin, time.monotonic(), *_loading(begin, job)))
        found["moves"].append({"job": job, "seconds": spans[-1][1] - begin})
    run = await task
    inside = lambda a, b, begin, end: a < end and b > begin  # noqa: E731
    calm = [b - a for a, b in run.gaps() if not any(inside(a, b, *span[:2]) for span in spans)]
    found["step_ms"].append(statistics.median(calm) * 1e3 if calm else None)
    found["calm_gaps_ms"] += [gap * 1e3 for gap in calm]
    for move, (begin, end, load_begin, load_end) in zip(
        found["moves"][-len(spans) :], spans, strict=True
    ):
        pairs = run.gaps()
        move["gaps_ms"] = [(b - a) * 1e3 for a, b in pairs if inside(a, b, begin, end)]
        move["loading_gaps_ms"] = [
            (b - a) * 1e3 for a, b in pairs if inside(a, b, load_begin, load_end)
        ]
    return run.tokens


def _loading(begin: float, job: dict[str, Any]) -> tuple[float, float]:
    """When the weights were loaded: the phase admitted, after the phase planned."""
    phases = job["phases_ms"]
    start = begin + phases.get("planned", 0.0) / 1e3
    return start, start + (phases.get("admitted", 0.0) + phases.get("staging", 0.0)) / 1e3


async def child(arguments: argparse.Namespace) -> dict[str, Any]:
    from vllm import AsyncEngineArgs  # noqa: PLC0415
    from vllm.v1.engine.async_llm import AsyncLLM  # noqa: PLC0415

    llm = AsyncLLM.from_engine_args(
        AsyncEngineArgs(
            model=str(arguments.model),
            pipeline_parallel_size=2,
            enforce_eager=True,
            dtype=arguments.dtype,
            max_model_len=1024,
            max_num_seqs=arguments.streams,
            block_size=32,
            additional_config={"pipelive": {}} if arguments.child == "plugin" else {},
        )
    )
    found: dict[str, Any] = {"speeds": [], "moves": [], "step_ms": [], "calm_gaps_ms": []}
    expected = (await generate(llm, arguments.streams, 32, "warm")).tokens
    for number in range(arguments.repetitions):
        run = await generate(llm, arguments.streams, arguments.tokens, f"idle{number}")
        found["speeds"].append(run.speed)
        expected = run.tokens
    found["tokens"] = expected
    if arguments.child == "plugin":
        found["moved_tokens_same"] = await moved(llm, arguments, found) == expected
    llm.shutdown()
    return found


def spawn(arguments: argparse.Namespace, kind: str) -> dict[str, Any]:
    """Measure one engine in a process of its own."""
    command = [sys.executable, __file__, "--child", kind, "--model", str(arguments.model)]
    for name in ("dtype", "streams", "tokens", "repetitions"):
        command += [f"--{name}", str(getattr(arguments, name))]
    for name in ("split", "other"):
        command += [f"--{name}", *map(str, getattr(arguments, name))]
    environment = os.environ | {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "0|1",
        "VLLM_PP_LAYER_PARTITION": ",".join(map(str, arguments.split)),
        "VLLM_PLUGINS": "pipelive",
        "VLLM_HOST_IP": "127.0.0.1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
    }
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.stderr.write(done.stderr[-4000:])
        raise SystemExit(f"the {kind} engine ended with {done.returncode}")
    answer: dict[str, Any] = json.loads(done.stdout.rpartition(MARK)[2].splitlines()[0])
    print(f"{kind}: {[round(speed, 1) for speed in answer['speeds']]} tokens/s", flush=True)
    return answer


def summary(stock: list[dict[str, Any]], plugin: list[dict[str, Any]]) -> dict[str, Any]:
    speeds = {
        name: [speed for turn in turns for speed in turn["speeds"]]
        for name, turns in (("stock", stock), ("plugin", plugin))
    }
    moves = [move for turn in plugin for move in turn["moves"]]
    step = statistics.median(gap for turn in plugin for gap in turn["calm_gaps_ms"])
    calm = sorted(gap for turn in plugin for gap in turn["calm_gaps_ms"])
    stops = [move["job"]["stop_ms"] for move in moves]
    return {
        "tokens_per_s": {name: statistics.median(found) for name, found in speeds.items()},
        "all_tokens_per_s": speeds,
        "idle_share_of_stock": statistics.median(speeds["plugin"])
        / statistics.median(speeds["stock"]),
        "step_ms": step,
        "longest_calm_gap_in_steps": calm[-1] / step,
        "p99_calm_gap_in_steps": calm[int(len(calm) * 0.99)] / step,
        "stop_ms": stops,
        "move_seconds": [move["seconds"] for move in moves],
        "mb_moved": [move["job"]["bytes_moved"] / 1e6 for move in moves],
        "longest_gap_in_a_move_in_steps": [max(move["gaps_ms"]) / step for move in moves],
        "longest_gap_while_loading_in_steps": [
            max(move["loading_gaps_ms"], default=0.0) / step for move in moves
        ],
        "tokens_same_as_stock": all(turn["tokens"] == stock[0]["tokens"] for turn in plugin),
        "tokens_same_when_moved": all(turn["moved_tokens_same"] for turn in plugin),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--model", type=Path, help="a folder with a checkpoint (default: SmolLM2)")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=192)
    parser.add_argument("--repetitions", type=int, default=4, help="runs of each engine")
    parser.add_argument("--turns", type=int, default=3, help="engines of each kind")
    parser.add_argument("--split", type=int, nargs=2, default=[18, 12], help="layers at start")
    parser.add_argument("--other", type=int, nargs=2, default=[12, 18], help="layers to move to")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--child", choices=["stock", "plugin"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(MARK + json.dumps(asyncio.run(child(arguments))), flush=True)
        return
    if arguments.model is None:
        from pipelive_kv.models.smollm import smollm2  # noqa: PLC0415

        arguments.model = smollm2()
    turns = [
        (spawn(arguments, "stock"), spawn(arguments, "plugin")) for _ in range(arguments.turns)
    ]
    found = summary([stock for stock, _ in turns], [plugin for _, plugin in turns])
    found["command"] = " ".join(sys.argv)
    found["date"] = datetime.date.today().isoformat()
    found["cores"] = os.cpu_count()
    print(json.dumps(found, indent=1))
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""vLLM with and without the plugin: speed with it idle, and the gaps between tokens around moves.

An engine of stock vLLM and one with the plugin stand beside each other and take turns, one run each
(``--pairs``), so that whatever else the machine does meets both; then the second one moves layers
while it serves, in turns with reconfigurations that move nothing, for comparison::

    make figures-vllm       # SmolLM2-135M, writes docs/benchmarks/cpu/vllm_serving.json
    make figures-vllm BENCH_ARGS="--pairs 1 --moved 1 --out build/vllm.json"
    scripts/vllm_env.sh python benchmarks/vllm_serving.py --model PATH --out FILE

Speed is tokens per second of all streams together, from the first token of the last stream to the
last of the first. A *gap* is the time between two tokens of one stream; it is told in units of the
median gap of the same streams outside of moves. The stop time is the wait for the decision, for the
gate and for the activation of the worst stage, as the reports have them; what the gate waits for
steps that were under way anyway is in it.
"""

from __future__ import annotations

import argparse
import asyncio
import datetime
import itertools
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
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


async def moved(
    llm: Any, arguments: argparse.Namespace, number: str, splits: Sequence[Sequence[int]]
) -> dict[str, Any]:
    """One run with a reconfiguration to each of the splits."""
    import pipelive_kv.engines.vllm as live  # noqa: PLC0415

    task = asyncio.ensure_future(generate(llm, arguments.streams, arguments.tokens, number))
    spans: list[tuple[float, float, float, float]] = []
    jobs = []
    for split in splits:
        await asyncio.sleep(1.0)
        begin = time.monotonic()
        jobs.append(await live.reconfigure_async(llm, split, timeout=300))
        spans.append((begin, time.monotonic(), *_loading(begin, jobs[-1])))
    run = await task
    inside = lambda a, b, begin, end: a < end and b > begin  # noqa: E731
    pairs = run.gaps()
    return {
        "tokens": run.tokens,
        "calm_gaps_ms": [
            (b - a) * 1e3 for a, b in pairs if not any(inside(a, b, *span[:2]) for span in spans)
        ],
        "moves": [
            {
                "job": job,
                "seconds": end - begin,
                "gaps_ms": [(b - a) * 1e3 for a, b in pairs if inside(a, b, begin, end)],
                "loading_gaps_ms": [
                    (b - a) * 1e3 for a, b in pairs if inside(a, b, load_begin, load_end)
                ],
                "longest_gap_ms_by_phase": {
                    phase: max(
                        ((b - a) * 1e3 for a, b in pairs if inside(a, b, *phase_span)), default=0.0
                    )
                    for phase, phase_span in _phases(begin, job).items()
                },
            }
            for job, (begin, end, load_begin, load_end) in zip(jobs, spans, strict=True)
        ],
    }


def _loading(begin: float, job: dict[str, Any]) -> tuple[float, float]:
    """When the weights were loaded: the phase admitted, after the phase planned."""
    phases = job["phases_ms"]
    start = begin + phases.get("planned", 0.0) / 1e3
    return start, start + (phases.get("admitted", 0.0) + phases.get("staging", 0.0)) / 1e3


def _phases(begin: float, job: dict[str, Any]) -> dict[str, tuple[float, float]]:
    """When each phase began and ended."""
    spans: dict[str, tuple[float, float]] = {}
    for phase, length in job["phases_ms"].items():
        spans[phase] = (begin, begin + length / 1e3)
        begin += length / 1e3
    return spans


async def child(arguments: argparse.Namespace) -> None:
    """One engine: a run for every line on the standard input."""
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
    await generate(llm, arguments.streams, 16, "warm")
    print(MARK + "{}", flush=True)
    for number, wish in enumerate(iter(sys.stdin.readline, "")):
        if wish.strip() == "move":
            splits = (arguments.other, arguments.split)
            answer = await moved(llm, arguments, f"run{number}", splits)
        elif wish.strip() == "stay":
            splits = (arguments.split, arguments.split)
            answer = await moved(llm, arguments, f"run{number}", splits)
        else:
            run = await generate(llm, arguments.streams, arguments.tokens, f"run{number}")
            gaps = [(b - a) * 1e3 for a, b in run.gaps()]
            answer = {"tokens": run.tokens, "speed": run.speed, "calm_gaps_ms": gaps}
        print(MARK + json.dumps(answer), flush=True)
    llm.shutdown()


class Child:
    """An engine in a process of its own."""

    def __init__(self, arguments: argparse.Namespace, kind: str) -> None:
        command = [sys.executable, __file__, "--child", kind, "--model", str(arguments.model)]
        for name in ("dtype", "streams", "tokens"):
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
        self.kind = kind
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - as long as the engine
        self.process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            start_new_session=True,
        )
        self.answer()

    def answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if MARK in line:
                found: dict[str, Any] = json.loads(line.partition(MARK)[2])
                return found
        self.log.seek(0)
        raise SystemExit(f"the {self.kind} engine ended:\n{self.log.read()[-4000:]}")

    def run(self, wish: str) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.write(wish + "\n")
        self.process.stdin.flush()
        return self.answer()

    def end(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            self.process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def stop_ms(move: dict[str, Any]) -> float:
    stop: float = move["job"]["stop_ms"] + move["job"]["decision_wait_ms"]
    return stop


def summary(idle: dict[str, list[Any]], moves: list[Any], stays: list[Any]) -> dict[str, Any]:
    speeds = {kind: [run["speed"] for run in runs] for kind, runs in idle.items()}
    ratios = [b / a for a, b in zip(speeds["stock"], speeds["plugin"], strict=True)]
    calm = sorted(gap for run in moves for gap in run["calm_gaps_ms"])
    step = statistics.median(calm)
    expected = idle["stock"][0]["tokens"]
    each = [move for run in moves for move in run["moves"]]
    nothing = [move for run in stays for move in run["moves"]]
    return {
        "tokens_per_s": {kind: statistics.median(found) for kind, found in speeds.items()},
        "all_tokens_per_s": speeds,
        "idle_share_of_stock": statistics.median(ratios),
        "all_shares": ratios,
        "step_ms": step,
        "longest_calm_gap_in_steps": calm[-1] / step,
        "p99_calm_gap_in_steps": calm[int(len(calm) * 0.99)] / step,
        "stop_ms": [stop_ms(move) for move in each],
        "decision_wait_ms": [move["job"]["decision_wait_ms"] for move in each],
        "stop_ms_where_nothing_moves": [stop_ms(move) for move in nothing],
        "longest_gap_where_nothing_moves_in_steps": [
            max(move["gaps_ms"], default=0.0) / step for move in nothing
        ],
        "move_seconds": [move["seconds"] for move in each],
        "mb_moved": [move["job"]["bytes_moved"] / 1e6 for move in each],
        "longest_gap_in_a_move_in_steps": [max(move["gaps_ms"]) / step for move in each],
        "longest_gap_by_phase_in_steps": [
            {phase: gap / step for phase, gap in move["longest_gap_ms_by_phase"].items()}
            for move in each
        ],
        "longest_gap_while_loading_in_steps": [
            max(move["loading_gaps_ms"], default=0.0) / step for move in each
        ],
        "longest_gap_in_stock_in_steps": [
            max(run["calm_gaps_ms"]) / statistics.median(run["calm_gaps_ms"])
            for run in idle["stock"]
        ],
        "tokens_same_as_stock": all(run["tokens"] == expected for run in idle["plugin"]),
        "stock_bit_stable": all(run["tokens"] == expected for run in idle["stock"]),
        "tokens_same_when_moved": all(run["tokens"] == expected for run in (*moves, *stays)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--model", type=Path, required=True, help="a folder with a checkpoint")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=192)
    parser.add_argument("--pairs", type=int, default=6, help="runs of each engine, in turns")
    parser.add_argument(
        "--moved", type=int, default=3, help="runs with a move each way, and as many without"
    )
    parser.add_argument("--split", type=int, nargs=2, default=[18, 12], help="layers at start")
    parser.add_argument("--other", type=int, nargs=2, default=[12, 18], help="layers to move to")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--child", choices=["stock", "plugin"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.pairs < 1 or arguments.moved < 1:
        parser.error(
            f"--pairs is {arguments.pairs}, --moved {arguments.moved}, expected 1 or more of each"
        )
    if arguments.child:
        asyncio.run(child(arguments))
        return
    engines: dict[str, Child] = {}
    idle: dict[str, list[Any]] = {"stock": [], "plugin": []}
    try:
        for kind in idle:
            engines[kind] = Child(arguments, kind)
        for number in range(arguments.pairs):
            for kind in sorted(idle, reverse=number % 2 == 0):  # neither is always the first
                idle[kind].append(engines[kind].run("idle"))
                print(f"{kind}: {idle[kind][-1]['speed']:.1f} tokens/s", flush=True)
        engines.pop("stock").end()
        moves, stays = [], []
        for _ in range(arguments.moved):
            moves.append(engines["plugin"].run("move"))
            stays.append(engines["plugin"].run("stay"))
    finally:
        for engine in engines.values():
            engine.end()
    found = summary(idle, moves, stays)
    found["command"] = " ".join(sys.argv).replace(str(Path.home()), "~")
    found["date"] = datetime.date.today().isoformat()
    found["cores"] = os.cpu_count()
    print(json.dumps(found, indent=1))
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""``vllm serve`` with two pipeline ranks changes its split while it answers eight streams.

Two servers run one after the other, with the same requests: stock vLLM, and vLLM with the plugin,
whose layers move to the other rank and back meanwhile. Tokens are compared, and times told apart
into before, during and after the moves::

    make demo-vllm                                          # SmolLM2-135M, float32
    python examples/vllm_live_reconfiguration.py --model PATH --streams 4 --tokens 120

Needs vLLM: `make demo-vllm` sets an environment up, and makes the model, for which that environment
lacks the packages.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PLACES = ["the sea", "a forest", "a railway", "a library", "a desert", "a harbour", "a city", "ice"]
KEY = "demo-key"


def call(port: int, path: str, body: Any = None, timeout: float = 120.0) -> Any:
    """One request to the server; the answer is opened, not read."""
    data = None if body is None else json.dumps(body).encode()
    headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", data, headers)
    return urllib.request.urlopen(request, timeout=timeout)


@contextmanager
def server(arguments: argparse.Namespace, *, plugin: bool) -> Iterator[None]:
    """``vllm serve`` until the block ends. With the plugin: two lines of configuration."""
    command = [
        *(sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(arguments.model)),
        *("--port", str(arguments.port), "--host", "127.0.0.1", "--api-key", KEY),
        *("--pipeline-parallel-size", "2", "--enforce-eager", "--dtype", "float32"),
        *("--max-model-len", "1024", "--max-num-seqs", str(arguments.streams)),
        *("--block-size", "32", "--served-model-name", "demo"),
    ]
    environment = os.environ | {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "0|1",
        "VLLM_PP_LAYER_PARTITION": ",".join(str(count) for count in arguments.split),
        "VLLM_HOST_IP": "127.0.0.1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "VLLM_PLUGINS": "pipelive",
    }
    if plugin:
        command += ["--additional-config", '{"pipelive": {}}']
    Path(arguments.log).parent.mkdir(parents=True, exist_ok=True)
    with Path(arguments.log).open("a") as log:
        process = subprocess.Popen(
            command, env=environment, stdout=log, stderr=log, start_new_session=True
        )
    try:
        await_health(arguments.port, process, arguments.log)
        yield
    finally:
        os.killpg(process.pid, signal.SIGINT)
        try:
            process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def await_health(port: int, process: subprocess.Popen[bytes], log: str) -> None:
    end = time.monotonic() + 600
    while time.monotonic() < end:
        if process.poll() is not None:
            raise SystemExit(f"vllm serve ended with {process.returncode}; see {log}")
        try:
            call(port, "/health", timeout=5).read()
        except OSError:
            time.sleep(0.5)
        else:
            return
    raise SystemExit(f"vllm serve was not ready within 600 s; see {log}")


class Stream(threading.Thread):
    """One streamed completion: the pieces of its text, and when each arrived."""

    def __init__(self, port: int, prompt: str, tokens: int) -> None:
        super().__init__(daemon=True)
        self.port, self.prompt, self.tokens = port, prompt, tokens
        self.pieces: list[str] = []
        self.times: list[float] = []

    def run(self) -> None:
        body = {
            "model": "demo",
            "prompt": self.prompt,
            "max_tokens": self.tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
        }
        with call(self.port, "/v1/completions", body, timeout=600) as answer:
            for line in answer:
                if not line.startswith(b"data: ") or line.startswith(b"data: [DONE]"):
                    continue
                choice = json.loads(line[6:])["choices"][0]
                self.times.append(time.monotonic())
                self.pieces.append(choice["text"])

    @property
    def text(self) -> str:
        return "".join(self.pieces)


def move(port: int, split: list[int], spans: list[tuple[float, float]]) -> dict[str, Any]:
    begin = time.monotonic()
    try:
        with call(port, "/pipelive/reconfigure", {"layers": split}) as answer:
            status: dict[str, Any] = json.load(answer)
    except urllib.error.HTTPError as error:
        raise SystemExit(f"the move to {split} was refused: {error.read().decode()}") from None
    spans.append((begin, time.monotonic()))
    job: dict[str, Any] = status["job"]
    print(
        f"  {job['from']} to {job['to']}: {job['bytes_moved'] / 1e6:.1f} MB of KV in "
        f"{job['rounds']} rounds, stop {job['stop_ms']:.2f} ms, {job['seconds']:.2f} s in all"
    )
    return job


def run(arguments: argparse.Namespace, moves: list[list[int]]) -> tuple[list[Stream], list[Any]]:
    """All streams at once; the moves follow each other while they run."""
    prompts = [f"A short story about {PLACES[i % 8]}, part {i}." for i in range(arguments.streams)]
    streams = [Stream(arguments.port, prompt, arguments.tokens) for prompt in prompts]
    spans: list[tuple[float, float]] = []
    for stream in streams:
        stream.start()
    for number, split in enumerate(moves):
        wait_for(streams, arguments.tokens * (number + 1) // (len(moves) + 2))
        move(arguments.port, split, spans)
    for stream in streams:
        stream.join()
    return streams, spans


def wait_for(streams: list[Stream], count: int) -> None:
    while any(stream.is_alive() for stream in streams) and len(streams[0].times) < count:
        time.sleep(0.01)


def gaps(streams: list[Stream], spans: list[Any], where: str) -> list[float]:
    """Milliseconds between tokens before, during or after the moves."""
    found = []
    for stream in streams:
        for before, after in zip(stream.times, stream.times[1:], strict=False):
            inside = any(before < end and after > begin for begin, end in spans)
            place = "during" if inside else "before" if after <= spans[0][0] else "after"
            if place == where:
                found.append((after - before) * 1e3)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--model", type=Path, required=True, help="a folder with a checkpoint")
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=160)
    parser.add_argument("--split", type=int, nargs=2, default=[22, 8], help="layers at start")
    parser.add_argument("--other", type=int, nargs=2, default=[12, 18], help="layers to move to")
    parser.add_argument("--port", type=int, default=0, help="default: one that is free")
    parser.add_argument("--log", default="build/vllm-demo.log", help="what the servers say")
    arguments = parser.parse_args()
    if arguments.port == 0:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            arguments.port = probe.getsockname()[1]

    print("stock vLLM:")
    with server(arguments, plugin=False):
        run(arguments, [])  # warms caches up, as below
        stock, _ = run(arguments, [])
    print("vLLM with the plugin:")
    with server(arguments, plugin=True):
        idle, _ = run(arguments, [])
        moved, spans = run(arguments, [arguments.other, arguments.split])
        print("  status:", call(arguments.port, "/pipelive/status").read().decode())

    def speed(streams: list[Stream]) -> float:
        begin, end = min(s.times[0] for s in streams), max(s.times[-1] for s in streams)
        return sum(len(s.times) for s in streams) / (end - begin)

    print(f"tokens/s: stock {speed(stock):.1f}, plugin idle {speed(idle):.1f}")
    for where in ("before", "during", "after"):
        found = gaps(moved, spans, where)
        if found:
            print(
                f"time per token {where:>6} the moves: p50 {statistics.median(found):.1f} ms, "
                f"longest {max(found):.1f} ms"
            )
    same = sum(a.text == b.text for a, b in zip(stock, moved, strict=True))
    print(f"texts identical to stock vLLM: {same}/{arguments.streams}")
    raise SystemExit(same != arguments.streams)


if __name__ == "__main__":
    main()

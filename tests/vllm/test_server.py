"""vLLM's own server with our routes: moves under load, who may call, what is refused, how it ends.

Prefix caching is off here; test_moves.py moves with it.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.vllm.runs import until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
KEY = "a key"


@dataclass
class Server:
    process: subprocess.Popen[bytes]
    port: int
    log: Path

    def call(
        self, path: str, body: Any = None, *, key: str = KEY, method: str | None = None
    ) -> tuple[int, bytes]:
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        url = f"http://127.0.0.1:{self.port}{path}"
        request = urllib.request.Request(url, data, method=method)
        request.add_header("Content-Type", "application/json")
        if key:
            request.add_header("Authorization", f"Bearer {key}")
        try:
            with urllib.request.urlopen(request, timeout=240) as answer:
                return answer.status, answer.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()

    def status(self) -> dict[str, Any]:
        code, body = self.call("/pipelive/status")
        assert code == 200, body
        found: dict[str, Any] = json.loads(body)
        return found

    def move(self, layers: list[int], **options: Any) -> dict[str, Any]:
        code, body = self.call("/pipelive/reconfigure", {"layers": layers, "options": options})
        assert code == 200, body
        found: dict[str, Any] = json.loads(body)
        return found

    def text(self, prompt: str, tokens: int) -> str:
        body = {
            "model": "tiny",
            "prompt": prompt,
            "max_tokens": tokens,
            "temperature": 0,
            "ignore_eos": True,
            "skip_special_tokens": False,
        }
        code, answer = self.call("/v1/completions", body)
        assert code == 200, answer
        choice = json.loads(answer)["choices"][0]["text"]
        assert len(choice.split()) == tokens
        return str(choice)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextlib.contextmanager
def serving(model: Path, folder: Path, *more: str) -> Iterator[Server]:
    log = folder / "log"
    port = free_port()
    with log.open("w") as output:
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(model)),
                *("--port", str(port), "--host", "127.0.0.1", "--api-key", KEY),
                *("--pipeline-parallel-size", "2", "--enforce-eager", "--dtype", "float32"),
                *("--max-model-len", "512", "--block-size", "32", "--no-enable-prefix-caching"),
                *("--num-gpu-blocks-override", "400", "--served-model-name", "tiny"),
                *more,
            ],
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    found = Server(process, port, log)
    try:
        until(lambda: process.poll() is not None or healthy(found))
        assert process.poll() is None, log.read_text()[-3000:]
        yield found
    finally:
        for child in [process.pid, *workers(process.pid)]:
            try:
                os.kill(child, signal.SIGKILL)
            except ProcessLookupError:
                continue
        process.wait()


@pytest.fixture(scope="module")
def server(tiny_llama, tmp_path_factory):
    options = ("--additional-config", '{"pipelive": {}}')
    with serving(tiny_llama, tmp_path_factory.mktemp("server"), *options) as found:
        yield found


def healthy(server: Server) -> bool:
    try:
        return server.call("/health")[0] == 200
    except OSError:
        time.sleep(0.2)
        return False


def workers(session: int, name: str = "") -> list[int]:
    """The processes of a session, which the server and all that it starts are."""
    listed = subprocess.run(
        ["ps", "-eo", "pid,sid,args"], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    return [
        int(line.split()[0])
        for line in listed
        if line.split()[1:2] == [str(session)] and name in line
    ]


def test_texts_are_the_same_over_ten_random_moves(server):
    dice = random.Random(11)
    prompts = [" ".join(f"t{5 + (7 * i + 3 * j) % 400}" for j in range(12 + i)) for i in range(8)]
    with ThreadPoolExecutor(8) as pool:

        def run() -> list[str]:
            return list(pool.map(lambda prompt: server.text(prompt, 150), prompts))

        expected = run()
        assert run() == expected, "vLLM is not bit-stable here, so moved runs cannot be compared"
        here, reports = server.status()["layers"][0], []
        while len(reports) < 10:
            texts = [pool.submit(server.text, prompt, 150) for prompt in prompts]
            while not all(text.done() for text in texts) and len(reports) < 10:
                here = dice.choice([n for n in range(1, 6) if n != here])
                found = server.move([here, 6 - here])
                assert found["layers"] == [here, 6 - here]
                reports.append(found["job"])
            assert [text.result() for text in texts] == expected
    assert sum(report["bytes_moved"] > 0 for report in reports) >= 5


def test_a_move_shows_in_status_and_metrics(server):
    if server.status()["layers"] != [3, 3]:
        server.move([3, 3])
    counted = metric(server, 'pipelive_reconfigurations_total{outcome="done"}')
    found = server.move([2, 4])
    assert found["layers"] == [2, 4]
    assert found["job"]["phase"] == "done"
    assert metric(server, 'pipelive_reconfigurations_total{outcome="done"}') == counted + 1
    assert metric(server, 'pipelive_layers{rank="1"}') == 4
    assert metric(server, 'pipelive_kv_blocks{state="capacity"}') > 0


def metric(server: Server, name: str) -> float:
    code, body = server.call("/metrics")
    assert code == 200
    for line in body.decode().splitlines():
        if line.startswith(name.removesuffix("}")):
            return float(line.split()[-1])
    return 0.0


def test_a_move_that_is_not_waited_for_can_be_cancelled(server):
    before = server.status()["layers"]
    body = {"layers": before[::-1], "wait": False, "options": {"pause": True}}
    code, answer = server.call("/pipelive/reconfigure", body)
    assert code == 200, answer
    assert server.call("/pipelive/reconfigure", {"layers": before[::-1]})[0] == 409
    assert server.call("/pipelive/cancel", b"")[0] == 200
    until(lambda: server.status()["job"]["final"])
    assert server.status()["layers"] == before
    assert server.status()["job"]["error"]["type"] == "CancelledError"


def test_a_paused_move_goes_on_when_told(server):
    before = server.status()["layers"]
    body = {"layers": before[::-1], "wait": False, "options": {"pause": True}}
    assert server.call("/pipelive/reconfigure", body)[0] == 200
    until(lambda: server.status()["job"]["phase"] == "armed")
    assert server.call("/pipelive/proceed", b"")[0] == 200
    until(lambda: server.status()["job"]["final"])
    assert server.status()["layers"] == before[::-1]


def test_a_move_given_up_is_told_and_the_old_split_serves(server):
    before = server.status()["layers"]
    body = {"layers": before[::-1], "timeout": 0.001}
    code, answer = server.call("/pipelive/reconfigure", body)
    assert code == 422, answer
    assert "DeadlineError" in json.loads(answer)["error"]
    assert server.status()["layers"] == before


@pytest.mark.parametrize("path", ["reconfigure", "status", "cancel", "proceed"])
@pytest.mark.parametrize("key", ["", "another key"])
def test_the_api_key_is_asked_for(server, path, key):
    body = None if path == "status" else {"layers": [3, 3]}
    method = "GET" if body is None else "POST"
    assert server.call(f"/pipelive/{path}", body, key=key, method=method)[0] == 401


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"", "truncated"),
        (b"{", "truncated"),
        (b"[]", "Expected `object`"),
        ({}, "layers"),
        ({"layers": "3,3"}, "Expected `array`"),
        ({"layers": [6, 0]}, "numbers of 1 or more"),
        ({"layers": [3, 3, 3]}, "expected 2 numbers"),
        ({"layers": [3, 3], "speed": 2}, "speed"),
        ({"layers": [3, 3], "timeout": -1}, "timeout is -1"),
        ({"layers": [3, 3], "options": {"mode": "fast"}}, "mode"),
        ({"layers": [3, 3], "options": {"wait": False}}, "options has wait"),
        ({"layers": [3, 3], "options": {"weights_from": "peer"}}, "peer"),
    ],
)
def test_bad_requests_are_refused(server, body, says):
    code, answer = server.call("/pipelive/reconfigure", body)
    assert code == 400, answer
    assert says in json.loads(answer)["error"]


def end_by_killing_a_worker(server: Server) -> int:
    """The server's exit status; nothing of it is left."""
    killed = workers(server.process.pid, "VLLM::Worker")
    assert len(killed) == 2
    os.kill(killed[0], signal.SIGKILL)
    code = server.process.wait(timeout=60)
    until(lambda: workers(server.process.pid) == [])
    return code


def test_a_killed_worker_ends_the_server_as_it_does_stock_vllm(server, tiny_llama, tmp_path):
    target = [2, 4] if server.status()["layers"] != [2, 4] else [4, 2]
    body = {"layers": target, "wait": False, "options": {"pause": True}}
    assert server.call("/pipelive/reconfigure", body)[0] == 200
    until(lambda: server.status()["job"]["phase"] == "armed")
    assert not server.status()["job"]["final"]
    code = end_by_killing_a_worker(server)
    with serving(tiny_llama, tmp_path) as stock:
        assert stock.text("t5 t6 t7", 5)
        assert code == end_by_killing_a_worker(stock)

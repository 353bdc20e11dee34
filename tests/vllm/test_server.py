"""vLLM's own API server with our routes: who may call them, what they refuse, how they end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
PORT, KEY = 8321, "a key"


def call(path, body=None, *, key=KEY, method=None):
    data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(f"http://127.0.0.1:{PORT}{path}", data, method=method)
    if key:
        request.add_header("Authorization", f"Bearer {key}")
    try:
        with urllib.request.urlopen(request, timeout=120) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


@pytest.fixture(scope="module")
def server(tiny_llama, tmp_path_factory):
    folder = tmp_path_factory.mktemp("server")
    log = (folder / "log").open("w")
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(tiny_llama)),
            *("--port", str(PORT), "--host", "127.0.0.1", "--api-key", KEY),
            *("--pipeline-parallel-size", "2", "--enforce-eager", "--dtype", "float32"),
            *("--max-model-len", "512", "--block-size", "32", "--skip-tokenizer-init"),
            *("--served-model-name", "tiny", "--additional-config", '{"pipelive": {}}'),
        ],
        env=os.environ | {"VLLM_PLUGINS": "pipelive", "VLLM_CPU_KVCACHE_SPACE": "1"},
        stdout=log,
        stderr=log,
        start_new_session=True,
    )
    end = time.monotonic() + 400
    while time.monotonic() < end:
        assert process.poll() is None, (folder / "log").read_text()[-3000:]
        try:
            if call("/health")[0] == 200:
                break
        except OSError:
            time.sleep(0.5)
    yield process
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    log.close()


def test_status_and_a_move(server):
    code, body = call("/pipelive/status")
    assert code == 200
    assert json.loads(body)["layers"] == [3, 3]
    code, body = call("/pipelive/reconfigure", {"layers": [2, 4]})
    assert code == 200, body
    found = json.loads(body)
    assert found["layers"] == [2, 4]
    assert found["job"]["phase"] == "done"
    code, body = call("/metrics")
    assert b'pipelive_reconfigurations_total{outcome="done"} 1.0' in body
    assert b'pipelive_layers{rank="1"} 4.0' in body


@pytest.mark.parametrize("path", ["/pipelive/status", "/pipelive/reconfigure", "/pipelive/cancel"])
@pytest.mark.parametrize("key", ["", "another key"])
def test_the_api_key_is_asked_for(server, path, key):
    body = None if path.endswith("status") else {"layers": [3, 3]}
    method = "GET" if body is None else "POST"
    assert call(path, body, key=key, method=method)[0] == 401


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
    code, answer = call("/pipelive/reconfigure", body)
    assert code == 400, answer
    assert says in json.loads(answer)["error"]


def test_a_killed_worker_ends_the_server_in_bounded_time(server):
    """As stock vLLM does: nothing of ours keeps it."""
    listed = subprocess.run(
        ["ps", "-eo", "pid,sid,args"], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    workers = [
        int(line.split()[0])
        for line in listed
        if line.split()[1:2] == [str(server.pid)] and "VLLM::Worker" in line
    ]
    assert workers
    os.kill(workers[0], signal.SIGKILL)
    server.wait(timeout=120)

"""The demo as a whole, on a tiny model: real stage processes, real moves."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import pytest

from pipelive_kv.cli import main
from pipelive_kv.demo.options import parse
from pipelive_kv.demo.prompts import MIN_PROMPT_TOKENS
from pipelive_kv.demo.report import DemoReport
from pipelive_kv.demo.setup import prepare
from pipelive_kv.models.tiny import tiny_model

pytestmark = pytest.mark.slow

SOURCE = Path(__file__).resolve().parents[2] / "src"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_model("llama", tmp_path_factory.mktemp("model"), max_position_embeddings=1024)


def start(model, out, *arguments):
    # A shell's background jobs ignore interrupts, and what they start inherits that.
    command = ["env", "--default-signal=INT", sys.executable]
    command += ["-m", "pipelive_kv.cli", "demo", "--model", str(model)]
    return subprocess.Popen(
        [*command, "--out", str(out), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(SOURCE)},
        start_new_session=True,
    )


def children_of(process):
    """Process ids of the group that the demo leads, itself not among them."""
    found = set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[2]) == process.pid and fields[0] != "Z":
                found.add(int(entry.name))
    return found - {process.pid}


@pytest.fixture(scope="module")
def run(model, tmp_path_factory):
    """One run of the three-stage demo; with ``--json``, so that stdout can be checked too."""
    out = tmp_path_factory.mktemp("out")
    process = start(model, out, "--quick", "--json", "--from", "3,2,1")
    stdout, stderr = process.communicate(timeout=280)
    return process, out, stdout, stderr


def test_tokens_are_identical(run):
    process, _, stdout, stderr = run
    assert process.returncode == 0, stderr
    report = msgspec.json.decode(stdout, type=DemoReport)
    assert report.ok
    assert report.tokens_identical == len(report.requests) == 4
    for request in report.requests:
        assert request.prompt_tokens >= MIN_PROMPT_TOKENS
        assert request.new_tokens == 40
        assert request.sha256_moved == request.sha256_unmoved


def test_what_happened_is_in_the_report(run):
    _, out, stdout, _ = run
    report = msgspec.json.decode(stdout, type=DemoReport)
    assert [(m.old, m.new) for m in report.moves] == [
        ((3, 2, 1), (1, 2, 3)),
        ((1, 2, 3), (3, 2, 1)),
    ]
    assert report.moves[0].layers_moved == (1, 2, 3, 4)
    assert report.moves[0].arrivals == 1
    assert report.requests[-1].arrived_in.startswith("move 1, ")
    assert all(move.bytes > 0 and move.rounds for move in report.moves)
    assert all(not move.bytes and not move.rounds for move in report.noops)
    assert len(set(report.moved.processes)) == 3
    assert set(report.moved.processes).isdisjoint(report.unmoved.processes)
    assert [memory.ok for memory in report.memory] == [True] * 3
    assert report.restart.requests > 0
    assert report.stop_and_copy.bytes > 0
    for name in ("report.json", "trace.json", "timeline.png"):
        assert (out / name).stat().st_size > 1000
    assert (out / "report.json").read_text() == stdout


def test_json_keeps_everything_else_from_stdout(run):
    _, _, stdout, stderr = run
    assert stdout.startswith("{")
    assert "moved run" in stderr
    assert "Traceback" not in stderr


def test_no_process_is_left(run):
    assert children_of(run[0]) == set()


def test_the_negative_control_fails(model, tmp_path):
    process = start(model, tmp_path, "--quick", "--json", "--corrupt")
    stdout, stderr = process.communicate(timeout=280)
    assert process.returncode == 1, stderr
    report = msgspec.json.decode(stdout, type=DemoReport)
    assert report.corrupted
    assert not report.ok
    assert report.tokens_identical < len(report.requests)
    assert any(request.first_difference > 0 for request in report.requests)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_ends_every_process(model, tmp_path, number):
    process = start(model, tmp_path, "--new-tokens", "700")
    try:
        for line in process.stdout:
            if "moved run" in line:
                break
        children = children_of(process)
        assert len(children) >= 2
        if number == signal.SIGINT:
            os.killpg(process.pid, number)  # as a terminal does: to all of them
        else:
            process.send_signal(number)
        _, stderr = process.communicate(timeout=60)
        assert process.returncode == 130, stderr
        assert "interrupted" in stderr
        assert "Traceback" not in stderr
        end = time.monotonic() + 20
        while children_of(process) and time.monotonic() < end:
            time.sleep(0.05)
        assert children_of(process) == set()
    finally:
        if process.poll() is None:
            process.kill()
            process.communicate(timeout=60)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--from", "20,10"], "--from is 20,10, 30 layers together; expected 6"),
        (["--new-tokens", "1024"], "--new-tokens is 1024; expected at most"),
    ],
)
def test_options_that_do_not_fit_the_model(model, tmp_path, capsys, arguments, says):
    assert main(["demo", "--model", str(model), "--out", str(tmp_path), *arguments]) == 2
    assert says in capsys.readouterr().err


def test_the_budget_is_tight_but_enough(model):
    setup = prepare(parse(["--model", str(model), "--from", "4,2", "--to", "1,5"]), lambda _: None)
    needed = 1 + sum(-(-(len(r.prompt) + r.max_new_tokens) // 16) for r in setup.requests)
    assert setup.config.first_capacity > needed
    assert setup.config.max_blocks > setup.config.first_capacity
    assert setup.budget_bytes % setup.config.page_bytes == 0

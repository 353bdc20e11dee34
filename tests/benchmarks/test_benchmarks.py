"""Every benchmark runs, with little to do, and says what it should; its figures are not judged."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"

# Long requests and two moves: a switchover at a prompt's step leaves no sample of its kind.
TINY = {
    "stop_time": "--model tiny --moves 2 --warm 1 --batch 2 --baseline 12 --tokens 256 --settle 2",
    "synthetic_move": "--mib 2 --moves 1 --sequences 4 --baseline 8 --step-ms 2 --transports shm",
    "patch_bandwidth": "--mib 4 --rounds 2 --transports shm tcp",
    "tpot_cost": "--model tiny --caps 100 --repetitions 1 --steps 6 --settle 2 --batch 2"
    " --tokens 32",
    "utilisation": "--traces churn-7 --blocks 64 --ticks 40 --stacks 1 4",
}
NEEDS_MODEL = {"stop_time", "tpot_cost"}


def run(*words, **more):
    done = subprocess.run(
        [sys.executable, *map(str, words)],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        **more,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


@pytest.mark.parametrize("name", TINY)
def test_runs_and_reports(name, tmp_path):
    if name in NEEDS_MODEL:
        pytest.importorskip("transformers")
    out = tmp_path / f"{name}.json"
    printed = run(BENCHMARKS / f"{name}.py", *TINY[name].split(), "--out", out)
    document = json.loads(out.read_text())
    assert document["benchmark"] == name
    assert document["machine"]["cores"] >= 1
    assert document["arguments"]["seed"] == 7
    assert document["figures"]
    assert all(figure["value"] is not None for figure in document["figures"])
    assert printed.count("|---|") >= 1 + len(document["tables"])


def test_moves_are_checked_and_counted(tmp_path):
    out = tmp_path / "move.json"
    words = TINY["synthetic_move"].replace("--transports shm", "--transports tcp").split()
    run(BENCHMARKS / "synthetic_move.py", *words, "--out", out)
    [(name, case)] = json.loads(out.read_text())["data"].items()
    assert name == f"{2 << 20}/tcp"
    assert [len(case["stops"][kind]) for kind in ("live", "stop_and_copy", "no-op")] == [1, 1, 2]


def test_a_pool_resizes_beside_a_decode_loop(tmp_path):
    """Written for GPUs; the CPU is another device to it."""
    pytest.importorskip("torch")
    out = tmp_path / "resize.json"
    words = ["--device", "cpu", "--mib", "16", "--layers", "1", "--batch", "1", "--rounds", "1"]
    path = os.pathsep.join([str(BENCHMARKS), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"PYTHONPATH": path}
    run(BENCHMARKS / "gpu/resize_bench.py", *words, "--out", out, env=environment)
    data = json.loads(out.read_text())["data"]
    assert data["pages"] == 8
    assert len(data["operations_s"]["lower"]) == len(data["operations_s"]["shrink"]) == 1
    assert len(data["steps_s"]["nothing"]) == 100
    assert data["steps_s"]["reclaim"]


def test_the_gpu_benchmark_of_transports_runs_without_a_gpu(tmp_path):
    pytest.importorskip("torch")
    out = tmp_path / "transport.json"
    run(BENCHMARKS / "gpu/transport_bench.py", "--device=cpu", "--mib=4", "--quick", "--out", out)
    rows = json.loads(out.read_text())["rows"]
    assert len(rows) == 3
    assert all(row["gb_s"] > 0 for row in rows)


def test_page_is_made_of_the_results(tmp_path):
    pytest.importorskip("matplotlib")
    folder = tmp_path / "cpu"
    words = TINY["utilisation"].split()
    png = folder / "utilisation.png"
    run(BENCHMARKS / "utilisation.py", *words, "--out", folder / "utilisation.json", "--png", png)
    assert png.read_bytes().startswith(b"\x89PNG")
    run(BENCHMARKS / "run_all.py", "--render", "--out", tmp_path)
    page = (tmp_path / "cpu.md").read_text()
    assert "## Wanted and measured" in page
    assert "## Memory utilisation" in page
    assert "(cpu/utilisation.png)" in page
    assert str(tmp_path) not in page

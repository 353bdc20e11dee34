"""Run all benchmarks and write the page of figures: ``--out/cpu.md``, from ``--out/cpu/*.json``.

``--full`` is the set that docs/benchmarks holds and takes about fifteen minutes on two quiet cores;
``--quick`` the same with little, to see that everything runs. ``--render`` only rewrites the page.
"""

from __future__ import annotations

import argparse
import ast
import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import ROOT, Figure, Table, figure_table, machine_line

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Benchmark:
    """A script with its arguments."""

    name: str
    title: str
    quick: str
    full: str
    drawing: str = ""


BENCHMARKS = (
    Benchmark(
        "stop_time",
        "Stop time under a model",
        "--model tiny --moves 3 --warm 1 --baseline 40 --tokens 96",
        "--moves 200",
    ),
    Benchmark(
        "synthetic_move",
        "Live move against stop-and-copy",
        "--mib 16 --moves 2 --baseline 30",
        "--mib 256 1024 --moves 8",
    ),
    Benchmark("patch_bandwidth", "Patch bandwidth", "--mib 64 --rounds 3", "--mib 256 --rounds 9"),
    Benchmark(
        "tpot_cost",
        "Cost to the tokens",
        "--model tiny --caps 50 500 --repetitions 2 --steps 10 --tokens 96",
        "--repetitions 6",
    ),
    Benchmark(
        "utilisation",
        "Memory utilisation",
        "--traces churn-7 --blocks 256",
        "",
        drawing="utilisation.png",
    ),
)


def run(benchmark: Benchmark, full: bool, folder: Path) -> bool:
    """Run one; whether it succeeded."""
    words = (benchmark.full if full else benchmark.quick).split()
    if benchmark.drawing:
        words += ["--png", str(folder / benchmark.drawing)]
    script = HERE / f"{benchmark.name}.py"
    print(f"== {benchmark.name} {' '.join(words)}", flush=True)
    begin = time.monotonic()
    code = subprocess.run(
        [sys.executable, str(script), *words, "--out", str(folder / f"{benchmark.name}.json")],
        check=False,
    ).returncode
    print(
        f"== {benchmark.name}: exit status {code}, {time.monotonic() - begin:.0f} s\n", flush=True
    )
    return code == 0


def render(folder: Path) -> str:
    """The page, from the result files that are there."""
    documents = {
        benchmark.name: json.loads(path.read_text())
        for benchmark in BENCHMARKS
        if (path := folder / f"{benchmark.name}.json").is_file()
    }
    if not documents:
        raise SystemExit(f"no result files in {folder}")
    machine = next(iter(documents.values()))["machine"]
    figures = [figure for document in documents.values() for figure in _figures(document)]
    parts = [
        "# Figures of the CPU build",
        f"Made by `benchmarks/run_all.py` on {machine_line(machine)}.",
        "Every limit was measured in the same run as the figure beside it. p50, p90 and p99 are "
        "values that were measured, not interpolated. A machine that others share shows in the "
        "spread.",
        figure_table(figures).markdown().replace("**Figures**", "## Wanted and measured"),
    ]
    for benchmark in BENCHMARKS:
        if benchmark.name in documents:
            parts.append(_section(benchmark, documents[benchmark.name], folder))
    return "\n\n".join(parts) + "\n"


def _section(benchmark: Benchmark, document: dict[str, Any], folder: Path) -> str:
    script = HERE / f"{benchmark.name}.py"
    described = ast.get_docstring(ast.parse(script.read_text())) or ""
    machine, shown = document["machine"], document["arguments"]
    options = ", ".join(
        f"{name.replace('_', '-')} {_words(value)}"
        for name, value in shown.items()
        if name not in ("out", "png") and value is not None
    )
    parts = [
        f"## {benchmark.title}",
        described,
        f"`benchmarks/{benchmark.name}.py`: {options}. It took {document['seconds']:.0f} s from a "
        f"load of {machine['load']}, at commit {machine['commit']}, {machine['date']}.",
    ]
    parts += [Table(**table).markdown() for table in document["tables"]]
    if benchmark.drawing and (folder / benchmark.drawing).is_file():
        parts.append(f"![{benchmark.title}]({folder.name}/{benchmark.drawing})")
    return "\n\n".join(parts)


def _figures(document: dict[str, Any]) -> list[Figure]:
    return [
        Figure(**(figure | {"value": float("nan") if figure["value"] is None else figure["value"]}))
        for figure in document["figures"]
    ]


def _words(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def main() -> None:
    made = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    kind = made.add_mutually_exclusive_group(required=True)
    kind.add_argument("--quick", action="store_true", help="little of everything")
    kind.add_argument("--full", action="store_true", help="the figures of docs/benchmarks")
    kind.add_argument("--render", action="store_true", help="only write the page again")
    made.add_argument("--out", type=Path, help="default: docs/benchmarks, build/figures if quick")
    made.add_argument("--only", nargs="+", choices=[b.name for b in BENCHMARKS], help="run these")
    arguments = made.parse_args()
    out = arguments.out or ROOT / ("build/figures" if arguments.quick else "docs/benchmarks")
    folder = out / "cpu"
    folder.mkdir(parents=True, exist_ok=True)
    failed = []
    if not arguments.render:
        chosen = [b for b in BENCHMARKS if not arguments.only or b.name in arguments.only]
        failed = [b.name for b in chosen if not run(b, arguments.full, folder)]
    (out / "cpu.md").write_text(render(folder))
    print(f"wrote {out / 'cpu.md'}")
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()

"""What the benchmarks share: figures with their limits, spreads, the machine, and result files.

A benchmark is a script. It prints Markdown tables, and with ``--out FILE`` leaves the same as JSON:
``{"benchmark", "machine", "arguments", "seconds", "figures": [...], "tables": [...]}``.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
MIB = 1 << 20


@dataclass(frozen=True)
class Spread:
    """Percentiles (nearest value measured, not interpolated) of one quantity."""

    count: int
    p50: float
    p90: float
    p99: float
    max: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        found = np.sort(np.fromiter(values, dtype=np.float64))
        if not len(found):
            return cls(0, float("nan"), float("nan"), float("nan"), float("nan"))

        def at(share: float) -> float:
            return float(found[min(len(found) - 1, int(np.ceil(share * len(found))) - 1)])

        return cls(len(found), at(0.5), at(0.9), at(0.99), float(found[-1]))

    def cells(self, scale: float = 1.0) -> list[str]:
        """Count and percentiles as table cells."""
        values = (self.p50, self.p90, self.p99, self.max)
        return [str(self.count), *(number(value * scale) for value in values)]


@dataclass(frozen=True)
class Interval:
    """A difference of two samples, with the interval that holds it in 95 of 100 resamplings."""

    value: float
    low: float
    high: float

    def text(self, scale: float = 1.0) -> str:
        """Such as "0.21 (0.15 to 0.30)"."""
        low, high = number(self.low * scale), number(self.high * scale)
        return f"{number(self.value * scale)} ({low} to {high})"


def difference(
    of: Sequence[Sequence[float]],
    than: Sequence[Sequence[float]],
    statistic: Callable[[Any], float],
    *,
    seed: int,
    resamplings: int = 2000,
) -> Interval:
    """``statistic`` of all values of ``of`` less that of ``than``, with a bootstrap interval.

    Each inner sequence is what one event has shown, such as the token gaps of one switchover:
    events are resampled, not values, since values of one event are alike.
    """
    random = np.random.default_rng(seed)
    samples = [
        [np.asarray(event, dtype=np.float64) for event in x if len(event)] for x in (of, than)
    ]

    def at(chosen: Sequence[Any]) -> float:
        return float(statistic(np.concatenate(list(chosen))))

    if not all(samples):
        return Interval(float("nan"), float("nan"), float("nan"))
    found = np.sort([
        at([samples[0][i] for i in random.integers(len(samples[0]), size=len(samples[0]))])
        - at([samples[1][i] for i in random.integers(len(samples[1]), size=len(samples[1]))])
        for _ in range(resamplings)
    ])  # fmt: skip
    low, high = found[int(0.025 * resamplings)], found[int(0.975 * resamplings) - 1]
    return Interval(at(samples[0]) - at(samples[1]), float(low), float(high))


def percentile(share: float) -> Callable[[Any], float]:
    """The measured value below which ``share`` of them lie, as `Spread` takes it."""

    def measured(values: Any) -> float:
        place = max(0, int(np.ceil(share * len(values))) - 1)
        return float(np.partition(values, place)[place])

    return measured


SPREAD_HEAD = ("count", "p50", "p90", "p99", "max")


def number(value: float) -> str:
    """Three significant digits, without an exponent."""
    if not np.isfinite(value):
        return "-"
    if value == 0:
        return "0"
    digits = max(0, 2 - int(np.floor(np.log10(abs(value)))))
    return f"{value:.{min(digits, 4)}f}"


@dataclass(frozen=True)
class Figure:
    """One figure beside what is wanted and what bounds it.

    Attributes:
        wanted: in words, with its unit; empty where the figure is stated without a target.
        limit: what bounds it, measured in the same run.
        met: whether it is as wanted; None where nothing is wanted.
    """

    name: str
    value: float
    unit: str
    wanted: str = ""
    limit: str = ""
    met: bool | None = None
    spread: str = ""


@dataclass(frozen=True)
class Table:
    """A titled table of texts, with a note on how to read it."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""

    def markdown(self) -> str:
        """The table as Markdown."""
        lines = [f"**{self.title}**", "", "| " + " | ".join(self.head) + " |"]
        lines.append("|" + "---|" * len(self.head))
        lines += ["| " + " | ".join(row) + " |" for row in self.rows]
        if self.note:
            lines += ["", self.note]
        return "\n".join(lines)


@dataclass
class Result:
    """What a benchmark found."""

    benchmark: str
    figures: list[Figure] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    data: dict[str, Any] = field(default_factory=dict)
    """Anything worth keeping that no table shows, such as all single values."""
    printed: int = 0
    """How many of the tables have been printed."""


def figure_table(figures: Sequence[Figure]) -> Table:
    """All figures with their targets."""
    verdict = {True: "yes", False: "**no**", None: "-"}
    rows = [
        [
            figure.name,
            figure.wanted or "-",
            f"{number(figure.value)} {figure.unit}".strip(),
            figure.spread or "-",
            verdict[figure.met],
            figure.limit or "-",
        ]
        for figure in figures
    ]
    return Table("Figures", ("figure", "wanted", "measured", "spread", "met", "limit"), rows)


def parser(description: str | None) -> argparse.ArgumentParser:
    """A parser with what every benchmark takes."""
    made = argparse.ArgumentParser(
        description=(description or "").split("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    made.add_argument("--out", type=Path, help="JSON file to write")
    made.add_argument("--seed", type=int, default=7, help="of all random choices")
    return made


def finish(result: Result, arguments: argparse.Namespace, started: float) -> None:
    """Print what was found and write the result file."""
    machine = machine_info()
    print(f"# {result.benchmark}\n\n{machine_line(machine)}\n")
    if result.figures:
        print(figure_table(result.figures).markdown() + "\n")
    _print_tables(result)
    _write(result, arguments, started, machine)


def keep(result: Result, arguments: argparse.Namespace, started: float) -> None:
    """Print and write what there is so far: of a run that is cut short it stays."""
    _print_tables(result)
    _write(result, arguments, started, machine_info())


def _print_tables(result: Result) -> None:
    for table in result.tables[result.printed :]:
        print(table.markdown() + "\n", flush=True)
    result.printed = len(result.tables)


def _write(
    result: Result, arguments: argparse.Namespace, started: float, machine: dict[str, Any]
) -> None:
    if arguments.out is None:
        return
    document = {
        "benchmark": result.benchmark,
        "machine": machine,
        "arguments": vars(arguments),
        "seconds": time.monotonic() - started,
        "figures": [asdict(figure) for figure in result.figures],
        "tables": [asdict(table) for table in result.tables],
        "data": result.data,
    }
    lines = [
        f"{json.dumps(name)}: {json.dumps(_plain(value), allow_nan=False)}"
        for name, value in document.items()
    ]
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def _plain(value: Any) -> Any:
    """What JSON can say: numbers in six digits, null where there is none."""
    if isinstance(value, dict):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if np.isfinite(value) else None
    return str(value) if isinstance(value, Path) else value


def machine_info() -> dict[str, Any]:
    """Processor, cores, memory, kernel, load, commit and date."""
    model, memory = platform.processor() or "unknown", 0
    for line in _lines("/proc/cpuinfo"):
        if line.startswith("model name"):
            model = line.split(":", 1)[1].strip()
            break
    for line in _lines("/proc/meminfo"):
        if line.startswith("MemTotal"):
            memory = int(line.split()[1]) << 10
    return {
        "cpu": model,
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(memory / 2**30, 1),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "commit": _commit(),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "load": round(os.getloadavg()[0], 2),
    }


def machine_line(machine: dict[str, Any]) -> str:
    """The machine in one line."""
    return (
        f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gib']} GiB, "
        f"Linux {machine['kernel']}, Python {machine['python']}; commit {machine['commit']}; "
        f"{machine['date']}; load {machine['load']}"
    )


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []


def _commit() -> str:
    def git(*words: str) -> str:
        return subprocess.run(
            ["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        # Results themselves, written before this one, do not make the code another one.
        dirty = git("status", "--porcelain", "--", ".", ":!docs/benchmarks")
        return git("rev-parse", "--short=12", "HEAD") + (" with changes" if dirty else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"

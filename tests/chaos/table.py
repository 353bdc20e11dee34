"""Writes case x phase x outcome into docs/reliability.md from what ``run --json`` has found.

``python -m tests.chaos.table build/chaos.json``
"""

from __future__ import annotations

import datetime
import json
import sys
from pathlib import Path
from typing import Any

from .cases import CASES

DOC = Path(__file__).resolve().parents[2] / "docs" / "reliability.md"
BEGIN, END = "<!-- chaos -->", "<!-- end of chaos -->"
PHASES = ("admitted", "staging", "patching", "armed", "switching", "releasing")


def table(found: dict[str, Any]) -> str:
    """The table, and a line on the run."""
    outcomes: dict[tuple[str, str], list[str]] = {}
    for outcome in found["outcomes"]:
        cell = outcome["outcome"] if outcome["reached"] else "not reached"
        if outcome["problems"]:
            cell = f"**{cell}: {outcome['problems'][0]}**"
        outcomes.setdefault((outcome["case"], outcome["phase"]), []).append(cell)
    lines = ["| fault | " + " | ".join(PHASES) + " |", "|---|" + "---|" * len(PHASES)]
    for case in CASES:
        cells = []
        for phase in PHASES:
            cell = sorted(set(outcomes.get((case.name, phase), [])))
            cells.append(", ".join(cell))
        lines.append(f"| {case.name} | " + " | ".join(cells) + " |")
    bad = sum(bool(outcome["problems"]) for outcome in found["outcomes"])
    day = datetime.datetime.now(tz=datetime.timezone.utc).strftime("%d %B %Y").lstrip("0")
    lines.append("")
    lines.append(
        f"{len(found['outcomes'])} trials, {bad} with problems, seed {found['seed']}, {day}."
    )
    return "\n".join(lines)


def main() -> int:
    """Rewrite the part of the document between its marks."""
    found = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    text = DOC.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN, 1)
    _, after = rest.split(END, 1)
    DOC.write_text(f"{before}{BEGIN}\n{table(found)}\n{END}{after}", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Checks that no constructor of the bindings runs under a call guard that releases the GIL.

pybind11 writes a new object into its table of instances inside the guard. Without the GIL that is a
race between threads that make objects at one time, which ends the process much later, when one of
them is given back ("Tried to deallocate unregistered instance"). A constructor that takes long
releases the GIL within its own function instead.
"""

from __future__ import annotations

import itertools
import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
GUARD = re.compile(r"\bRelease\(\)|call_guard<py::gil_scoped_release>")
DEFINITION = re.compile(r"\n\s*(?:\.def\w*\(|m\.def\(|py::class_<)")


def guarded_constructors(text: str) -> Iterator[int]:
    """The lines of a source file at which a constructor under such a guard begins."""
    begins = [match.start() + 1 for match in DEFINITION.finditer(text)]
    for begin, end in itertools.pairwise([*begins, len(text)]):
        definition = text[begin:end]
        if "py::init" in definition and GUARD.search(definition):
            yield text.count("\n", 0, begin) + 1


def main() -> int:
    """Print what is wrong; return 1 if anything is."""
    found = [
        f"{path.relative_to(ROOT)}:{line}: release the GIL within the constructor's function"
        for path in sorted((ROOT / "python").glob("*.cpp"))
        for line in guarded_constructors(path.read_text())
    ]
    for line in found:
        print(line, file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())

"""Checks that layers only know those below them, in the C++ core and in the Python package.

The core's order is what cpp/CMakeLists.txt says: the linker sees calls upwards, this also sees
headers. The package's order is LAYERS below; docs/design.md explains both.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "pipelive_kv"

# Bottom up. A module may import modules of its own line and of the lines above it.
LAYERS: tuple[tuple[str, ...], ...] = (
    ("_core",),
    ("build_info", "cuda_arrays", "errors", "placement", "plan", "spec", "waves"),
    (
        "attention",
        "blocks",
        "kv",
        "memory",
        "migration",
        "models",
        "tracker",
        "transport",
        "weights",
    ),
    ("control", "messages", "protocol", "record"),
    ("coordinator", "scheduler", "stage"),
    ("doctor", "engines", "trace"),
    ("cli", "demo"),
)
RANK = {module: rank for rank, layer in enumerate(LAYERS) for module in layer}


def core_layers() -> dict[str, set[str]]:
    """Return for every C++ layer the layers it may include, itself among them."""
    text = (ROOT / "cpp/CMakeLists.txt").read_text()
    allowed: dict[str, set[str]] = {}
    for name, depends in re.findall(r"^pipelive_layer\((\w+)(?: DEPENDS ([\w ]+))?\)", text, re.M):
        below = {name}
        for dependency in depends.split():
            below |= allowed[dependency]
        allowed[name] = below
    return allowed


def core_violations() -> Iterator[str]:
    """Find includes of a layer that the including file's layer may not know."""
    allowed = core_layers()
    places = [
        (path, layer)
        for layer in allowed
        for pattern in (
            "include/pipelive/{}/**/*",
            "src/{}/**/*",
            "tests/{}/**/*",
            "bench/{}_bench*",
        )
        for path in (ROOT / "cpp").glob(pattern.format(layer))
    ]
    allowed["cuda"] = allowed["attention"] | allowed["transport"] | {"tracker", "cuda"}
    places += [(path, "cuda") for path in (ROOT / "cuda").rglob("*")]
    for path, layer in places:
        if path.suffix not in {".hpp", ".cpp", ".cu", ".cuh"}:
            continue
        for number, line in enumerate(path.read_text().splitlines(), 1):
            include = re.match(r'\s*#\s*include\s+[<"]pipelive/(\w+)/', line)
            if include and include[1] not in allowed[layer]:
                yield f"{path.relative_to(ROOT)}:{number}: {layer} may not include {include[1]}"


class _Imports(ast.NodeVisitor):
    """Collects the package's modules that one file imports, except for type checking only."""

    def __init__(self, module: str) -> None:
        self.parts = module.split(".")
        self.found: list[tuple[int, str]] = []

    def visit_If(self, node: ast.If) -> None:
        test = node.test
        name = test.attr if isinstance(test, ast.Attribute) else getattr(test, "id", "")
        for child in node.orelse if name == "TYPE_CHECKING" else [*node.body, *node.orelse]:
            self.visit(child)

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            if alias.name.split(".")[0] == PACKAGE:
                self._add(node.lineno, alias.name)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        base = (node.module or "").split(".") if node.module else []
        if node.level:
            base = self.parts[: len(self.parts) - node.level] + base
        if base[:1] != [PACKAGE]:
            return
        if len(base) > 1:
            self._add(node.lineno, ".".join(base))
        else:
            for alias in node.names:
                self._add(node.lineno, f"{PACKAGE}.{alias.name}")

    def _add(self, line: int, module: str) -> None:
        self.found.append((line, module.split(".")[1] if "." in module else ""))


def package_violations() -> Iterator[str]:
    """Find imports of a module above the importing one, and modules without a place."""
    source = ROOT / "src" / PACKAGE
    for path in sorted(source.rglob("*.py")):
        inside = path.relative_to(source).with_suffix("").parts
        module = inside[0]
        where = path.relative_to(ROOT)
        if module == "__init__":
            continue  # the package's front door may know everything
        if module == "__main__":
            module = "cli"
        if module not in RANK:
            yield f"{where}:1: {module} has no place in LAYERS of scripts/check_layers.py"
            continue
        imports = _Imports(".".join((PACKAGE, *inside)))
        imports.visit(ast.parse(path.read_text(), str(path)))
        for line, imported in imports.found:
            if imported not in RANK:
                # The front door imports everything, so only the top may go through it.
                if RANK[module] < RANK["engines"]:
                    yield f"{where}:{line}: {module} may not import the package itself"
            elif RANK[imported] > RANK[module]:
                yield f"{where}:{line}: {module} may not import {imported}"


def main() -> int:
    """Print what is wrong; return 1 if anything is."""
    violations = [*core_violations(), *package_violations()]
    for violation in violations:
        print(violation, file=sys.stderr)
    return 1 if violations else 0


if __name__ == "__main__":
    sys.exit(main())

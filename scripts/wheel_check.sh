#!/usr/bin/env bash
# Installs the package into a fresh environment, as a user would, and checks what came with it.
set -euo pipefail
cd "$(dirname "$0")/.."

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
"${PYTHON:-python3}" -m venv "$scratch/venv"
"$scratch/venv/bin/python" -m pip install -q .
cd "$scratch"
"$scratch/venv/bin/python" - <<'CHECK'
import importlib.metadata
import pathlib

import pipelive_kv
from pipelive_kv.build_info import build_info

installed = sorted(d.metadata["Name"].lower() for d in importlib.metadata.distributions())
print("installed:", ", ".join(installed))
unwanted = [n for n in installed if n.startswith(("torch", "cupy", "nvidia", "transformers"))]
assert not unwanted, f"the plain package pulled {unwanted}"
extensions = [p.name for p in pathlib.Path(pipelive_kv.__file__).parent.glob("*.so")]
assert len(extensions) == 1, f"expected one extension, found {extensions}"
assert build_info().version == importlib.metadata.version("pipelive-kv")
print(build_info())
CHECK

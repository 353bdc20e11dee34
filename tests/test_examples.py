"""Examples run as they stand in the repository."""

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
NEED_MORE = {"vllm_live_reconfiguration.py"}
"""What runs in an environment of its own."""


@pytest.mark.parametrize("name", sorted({path.name for path in EXAMPLES.glob("*.py")} - NEED_MORE))
def test_runs(name):
    done = subprocess.run(
        [sys.executable, EXAMPLES / name], capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "tokens identical: 4/4" in done.stdout

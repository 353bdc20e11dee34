"""The pipeline of tests/coordination serves here as the one that is attacked."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "coordination"))

"""A part of the chaos suite that fits into every test run: each kind of fault, in one phase each.

``make chaos`` runs all of it, any number of times.
"""

from __future__ import annotations

import random

import pytest

from .cases import CASES
from .run import Chaos


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_kind_of_fault_in_one_phase():
    seed = random.SystemRandom().randrange(1 << 32)
    print("seed", seed)
    dice = random.Random(seed)
    cases = [(case, dice.choice(case.phases)) for case in CASES]
    chaos = Chaos(seed)
    try:
        bad = [outcome for outcome in chaos.trials(cases) if outcome.problems]
    finally:
        chaos.close()
    assert not bad, f"seed {seed}: {bad}"

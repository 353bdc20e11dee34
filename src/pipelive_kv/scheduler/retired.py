"""Which steps have retired, as the step that is being built may see it."""

from __future__ import annotations

import threading
from dataclasses import dataclass


@dataclass
class RetiredSteps:
    """Keeps what a step may touch from changing while the step is being built.

    A stamp says which steps' writes its step may touch. A step that retires while the engine
    builds the next one from such a stamp must not lend that one its blocks, nor its requests: the
    gate would not wait for what it wrote. So what another thread than the engine's tells counts
    from the next stamp on.
    """

    through: int = -1
    """All steps up to this one have retired, for whoever builds a step now."""
    told: int = -1
    """The same, for the next stamp."""
    first_step: int = 0
    """The switchover: the first step of the placement of the step that was stamped last."""
    builder: int | None = None
    """The engine's thread: the one that stamped last."""

    def tell(self, seq: int) -> bool:
        """Note that the steps up to ``seq`` have retired; returns whether that counts at once."""
        self.told = max(self.told, seq)
        return self.builder in (None, threading.get_ident()) and self.settle()

    def settle(self) -> bool:
        """What was told counts from now on; returns whether there was something."""
        news = self.told > self.through
        self.through = self.told
        return news

    def is_hazard(self, seq: int) -> bool:
        """Whether step ``seq`` ran before the switchover and is still under way."""
        return self.through < seq < self.first_step

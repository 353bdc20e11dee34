"""Which steps under way a new step follows on from, told by the blocks that they write."""

from __future__ import annotations

from collections.abc import Iterable


class WritesInFlight:
    """Keeps the blocks that each step writes until the step has retired.

    A step of which nothing was told is taken for one that writes every block.
    """

    def __init__(self) -> None:
        self._written: dict[int, frozenset[int]] = {}

    def last_met(self, seq: int, retired: int, touches: Iterable[int]) -> int:
        """The last step before ``seq`` that has to be over for what touches these blocks.

        Args:
            seq: the step that is being built.
            retired: all steps up to this one have retired; it is the least that is returned.
            touches: the block ids that the step reads or writes.
        """
        for done in [known for known in self._written if known <= retired]:
            del self._written[done]
        touched = frozenset(touches)
        for earlier in range(seq - 1, retired, -1):
            written = self._written.get(earlier)
            if written is None or not written.isdisjoint(touched):
                return earlier
        return retired

    def note(self, seq: int, writes: Iterable[int]) -> None:
        """Step ``seq`` writes these blocks and no others."""
        self._written[seq] = frozenset(writes)

    def forget(self) -> None:
        """Ids have changed their meaning; nothing is known of the steps so far."""
        self._written.clear()

"""How hidden states get from one stage's process to the next, also when processes come and go."""

from __future__ import annotations

import datetime
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pipelive_kv.errors import PipeliveError, ProtocolError

if TYPE_CHECKING:
    import torch

__all__ = ["Groups"]


@dataclass(frozen=True)
class _Group:
    ranks: tuple[int, ...]
    process_group: Any


class Groups:
    """The process groups of one stage's process.

    A gloo group cannot grow, so there is a new one whenever a process has joined. It is made in the
    background while steps use the one before; each step says which one it uses, the same on every
    stage.

    Args:
        directory: a private folder in which the processes meet. They do so by a file, since a TCP
            store would listen on every interface.
        rank: of the stage.
        timeout: seconds for one message, or for all to meet.
        max_sent: messages under way before a send waits.
    """

    def __init__(self, directory: str, rank: int, *, timeout: float, max_sent: int) -> None:
        self._directory = directory
        self._rank = rank
        self._timeout = timeout
        self._max_sent = max_sent
        self._lock = threading.Lock()
        self._groups: dict[int, _Group] = {}
        self._sent: deque[tuple[Any, torch.Tensor]] = deque()

    def meet(self, number: int, ranks: Sequence[int]) -> None:
        """Connect with the processes of `ranks`, each of which does the same.

        Raises:
            RuntimeError: one of them did not come in time.
        """
        import torch.distributed as dist  # noqa: PLC0415

        made = None
        if len(ranks) > 1:
            store = dist.FileStore(  # type: ignore[attr-defined]
                f"{self._directory}/group-{number}", len(ranks)
            )
            limit = datetime.timedelta(seconds=self._timeout)
            store.set_timeout(limit)
            made = dist.ProcessGroupGloo(store, list(ranks).index(self._rank), len(ranks), limit)
        with self._lock:
            self._groups[number] = _Group(tuple(ranks), made)

    def meet_later(self, number: int, ranks: Sequence[int], tell: Callable[[str], object]) -> None:
        """The same in a thread of its own, which tells the error, or an empty text, at its end."""

        def run() -> None:
            try:
                self.meet(number, ranks)
            except Exception as error:
                tell(f"{type(error).__name__}: {error}")
            else:
                tell("")

        threading.Thread(target=run, name=f"pipelive-meet-{number}", daemon=True).start()

    def receive(self, number: int, source: int, into: torch.Tensor, tag: int) -> None:
        """Wait for the tensor that stage `source` sends with `tag`."""
        group, index = self._find(number, source)
        group.recv([into], index, tag).wait()

    def send(self, number: int, target: int, tensor: torch.Tensor, tag: int) -> None:
        """Send without waiting: gloo's blocking send waits for the other side to receive."""
        group, index = self._find(number, target)
        while len(self._sent) >= self._max_sent:
            self._sent.popleft()[0].wait()
        tensor = tensor.contiguous()
        self._sent.append((group.send([tensor], index, tag), tensor))

    def _find(self, number: int, rank: int) -> tuple[Any, int]:
        with self._lock:
            found = self._groups.get(number)
            # Of the one before, messages may still be under way.
            for old in [known for known in self._groups if known < number - 1]:
                del self._groups[old]
        if found is None or found.process_group is None or rank not in found.ranks:
            raise ProtocolError(f"stage {self._rank} has no connection to {rank} in group {number}")
        return found.process_group, found.ranks.index(rank)


def neighbours(stages: Sequence[Sequence[int]], rank: int) -> tuple[int | None, int | None]:
    """The stages with layers before and after `rank`, which has some; None at the ends."""
    if not stages[rank]:
        raise PipeliveError(f"stage {rank} holds no layer")
    busy = [other for other, layers in enumerate(stages) if layers]
    at = busy.index(rank)
    before = busy[at - 1] if at > 0 else None
    return before, busy[at + 1] if at + 1 < len(busy) else None

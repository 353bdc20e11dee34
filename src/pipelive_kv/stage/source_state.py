"""What the parts of a source's session share, and the rules by which they end."""

from __future__ import annotations

import math
import threading
import time
from dataclasses import dataclass, field

from pipelive_kv.errors import CancelledError, DeadlineError, PipeliveError
from pipelive_kv.messages import RoundRecord
from pipelive_kv.migration import WriteThrough
from pipelive_kv.stage.convergence import Convergence
from pipelive_kv.stage.limits import TRANSFER_TIMEOUT


@dataclass
class SourceState:
    """What the engine's thread, the control plane's and the patch thread share.

    Guarded by its lock.
    """

    epoch: int
    ends_at: float
    """On the monotonic clock; without end once the stage has voted, or the step is known."""

    sealed: int = -1
    promised: bool = False
    """The stage has voted: a connection that is lost is made again."""
    limit: int | None = None
    """The last step that ran the old placement; its writes are the tail."""
    applied: int = -1
    stopping: bool = False
    convergence: Convergence = field(default_factory=Convergence)
    wanted: bool = False
    """Write-through was asked for."""
    through: WriteThrough | None = None
    """Write-through, once it runs."""
    error: PipeliveError | None = None
    rounds: list[RoundRecord] = field(default_factory=list)
    tail_done: bool = False
    tail_ns: int = 0
    """When the tail was applied."""
    bytes_sent: int = 0
    lock: threading.Condition = field(default_factory=threading.Condition)

    @property
    def last_to_send(self) -> float:
        """The last step whose writes are to be sent."""
        return math.inf if self.limit is None else self.limit

    def rest(self) -> float:
        """How long a message may take: not until the session's deadline, which ends with a promise.

        Raises:
            DeadlineError: that deadline has passed.
        """
        with self.lock:
            if time.monotonic() >= self.ends_at:
                self.error = DeadlineError(
                    f"the migration of epoch {self.epoch} ran past its deadline"
                )
                raise self.error
        return TRANSFER_TIMEOUT

    def check_promised(self, error: PipeliveError) -> None:
        """Raise ``error`` unless the stage has voted, so that what was lost is made again."""
        with self.lock:
            self.check_stopping()
            if not self.promised:
                raise error

    def check_stopping(self) -> None:
        """Raise CancelledError where the session is being ended; with the lock held."""
        if self.stopping:
            raise CancelledError("the migration was cancelled")

    def fail(self, error: PipeliveError) -> None:
        """Note what ended the thread; the first one counts."""
        with self.lock:
            if self.error is None:
                self.error = error
            self.lock.notify_all()

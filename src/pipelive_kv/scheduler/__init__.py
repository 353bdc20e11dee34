"""The engine scheduler's part of the protocol."""

from pipelive_kv.scheduler.scheduler import Scheduler
from pipelive_kv.scheduler.state import BlockOwner, runs_of

__all__ = ["BlockOwner", "Scheduler", "runs_of"]

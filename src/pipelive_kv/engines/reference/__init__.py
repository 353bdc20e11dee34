"""A small pipeline engine: continuous batching over stage processes, built on the public API.

It shows how an engine embeds the library and is plain enough to read in one sitting: `config`
(what a caller says and gets), `batcher` (who runs in which step), `messages`, `worker` (a stage
process) and `engine` (the driver).
"""

from pipelive_kv.engines.reference.config import (
    EngineConfig,
    EngineFailedError,
    Request,
    RequestResult,
    StageTimes,
    StepRecord,
    WrapHooks,
)
from pipelive_kv.engines.reference.engine import Engine

__all__ = [
    "Engine",
    "EngineConfig",
    "EngineFailedError",
    "Request",
    "RequestResult",
    "StageTimes",
    "StepRecord",
    "WrapHooks",
]

"""A KV-cache and migration runtime: layers move between pipeline stages while tokens flow.

See docs/design.md for the words, README.md for how an engine embeds it.
"""

from pipelive_kv.attention import append, paged_attention
from pipelive_kv.blocks import BlockAllocator
from pipelive_kv.build_info import BuildInfo, build_info
from pipelive_kv.control import ControlEndpoint, ControlKey
from pipelive_kv.coordinator import Coordinator, Job, MigrationOptions, Phase, Report
from pipelive_kv.errors import (
    BusyError,
    CancelledError,
    ClosedError,
    CorruptError,
    DeadlineError,
    DeviceError,
    InvalidArgumentError,
    NotResidentError,
    OutOfMemoryError,
    OverBudgetError,
    PipeliveError,
    ProtocolError,
)
from pipelive_kv.kv import KVPool, LayerView
from pipelive_kv.memory import Arena, PagePool
from pipelive_kv.messages import Stamp
from pipelive_kv.placement import Move, Placement
from pipelive_kv.plan import Plan, StageBudget, plan
from pipelive_kv.record import Decision, DecisionRecord, FileDecisionRecord
from pipelive_kv.scheduler import Scheduler
from pipelive_kv.spec import KVSpec
from pipelive_kv.stage import EngineHooks, LayerWeights, Stage, Step
from pipelive_kv.tracker import DirtyTracker
from pipelive_kv.weights import SafetensorsSource, TensorSpec, WeightArena, WeightSource

__all__ = [
    "Arena",
    "BlockAllocator",
    "BuildInfo",
    "BusyError",
    "CancelledError",
    "ClosedError",
    "ControlEndpoint",
    "ControlKey",
    "Coordinator",
    "CorruptError",
    "DeadlineError",
    "Decision",
    "DecisionRecord",
    "DeviceError",
    "DirtyTracker",
    "EngineHooks",
    "FileDecisionRecord",
    "InvalidArgumentError",
    "Job",
    "KVPool",
    "KVSpec",
    "LayerView",
    "LayerWeights",
    "MigrationOptions",
    "Move",
    "NotResidentError",
    "OutOfMemoryError",
    "OverBudgetError",
    "PagePool",
    "Phase",
    "PipeliveError",
    "Placement",
    "Plan",
    "ProtocolError",
    "Report",
    "SafetensorsSource",
    "Scheduler",
    "Stage",
    "StageBudget",
    "Stamp",
    "Step",
    "TensorSpec",
    "WeightArena",
    "WeightSource",
    "append",
    "build_info",
    "paged_attention",
    "plan",
]

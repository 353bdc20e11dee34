"""The coordinator: takes one placement to the next, phase by phase."""

from pipelive_kv.coordinator.coordinator import Coordinator
from pipelive_kv.coordinator.job import Job
from pipelive_kv.coordinator.options import MigrationOptions, Mode, WeightsFrom
from pipelive_kv.coordinator.report import PhaseSpan, Report
from pipelive_kv.protocol import Phase

__all__ = [
    "Coordinator",
    "Job",
    "MigrationOptions",
    "Mode",
    "Phase",
    "PhaseSpan",
    "Report",
    "WeightsFrom",
]

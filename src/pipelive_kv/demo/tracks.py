"""The demo's runs as a trace: steps per stage, tokens, phases, rounds, gates and memory."""

from __future__ import annotations

from pipelive_kv.demo.baselines import Baselines
from pipelive_kv.demo.recorder import Recorder
from pipelive_kv.demo.scenario import Outcome
from pipelive_kv.trace import Trace

NOTABLE_GATE = 20e-6
"""Seconds; a gate that is open takes less."""


def trace_of(moved: Outcome, baselines: Baselines, unmoved: Outcome) -> Trace:
    """All runs on one time line, as they were made one after the other."""
    trace = Trace(_ns(moved.recorder.started))
    for rank, process in enumerate(moved.processes):
        trace.process(f"stage {rank}", process)
    for title, recorder in (
        ("moved run", moved.recorder),
        ("stop-and-copy", baselines.recorder),
        ("unmoved run", unmoved.recorder),
    ):
        trace.span(trace.track("demo", "runs"), title, _ns(recorder.started), _ns(recorder.ended))
        add_run(trace, recorder)
    return trace


def add_run(trace: Trace, recorder: Recorder) -> None:
    """Add what one run's recorder has seen."""
    for step in recorder.steps:
        for stage in step.stages:
            process = f"stage {stage.rank}"
            about = {"seq": step.seq, "epoch": step.epoch, "layers": stage.num_layers}
            name = f"{step.kind} {step.seq}"
            trace.span(
                trace.track(process, "steps"),
                name,
                _ns(stage.start),
                _ns(stage.end),
                rows=step.rows,
                **about,
            )
            if stage.gate > NOTABLE_GATE:
                start = _ns(stage.start)
                trace.span(
                    trace.track(process, "gates"), name, start, start + _ns(stage.gate), **about
                )
    for switch in recorder.switchovers:
        trace.add_report(switch.report)
    for token in recorder.tokens:
        trace.instant(
            trace.track("requests", f"request {token.request}"),
            f"token {token.token}",
            _ns(token.at),
            step=token.seq,
        )
    for sample in recorder.samples:
        at = _ns(sample.at)
        for progress in sample.stages:
            process = f"stage {progress.rank}"
            trace.counter(process, "memory MiB", at, {"used": progress.used_bytes / 2**20})
            trace.counter(process, "lag steps", at, {"lag": progress.lag_steps})
            trace.counter(process, "resident blocks", at, {"blocks": progress.capacity})


def _ns(seconds: float) -> int:
    return int(seconds * 1e9)

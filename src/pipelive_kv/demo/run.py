"""The whole demo: the moved run, the baselines, the unmoved run, and what came of it."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

import msgspec

from pipelive_kv.build_info import build_info
from pipelive_kv.demo import measure
from pipelive_kv.demo.baselines import Baselines, stop_and_copy_then_restart
from pipelive_kv.demo.corrupt import zero_moved_layer
from pipelive_kv.demo.options import DemoOptions
from pipelive_kv.demo.report import (
    DemoReport,
    Gaps,
    RequestReport,
    RunReport,
    StageMemory,
)
from pipelive_kv.demo.scenario import Outcome, Pace, moved_run, unmoved_run
from pipelive_kv.demo.setup import DTYPE, Setup, prepare
from pipelive_kv.demo.timeline import draw_timeline
from pipelive_kv.demo.tracks import trace_of
from pipelive_kv.demo.view import View
from pipelive_kv.engines.reference import Engine

REPORT, TRACE, TIMELINE = "report.json", "trace.json", "timeline.png"


@dataclass(frozen=True)
class Findings:
    """All that was recorded, before it becomes a report."""

    options: DemoOptions
    setup: Setup
    moved: Outcome
    baselines: Baselines
    unmoved: Outcome
    seconds: float


def run_demo(options: DemoOptions, view: View) -> DemoReport:
    """Run the demo and write report.json, trace.json and timeline.png.

    Raises:
        OptionError: options that do not fit the model.
        PipeliveError: an engine or a reconfiguration failed.
    """
    started = time.monotonic()
    setup = prepare(options, view.say)
    view.on_setup(setup)
    pace = Pace(warm=3, settle=6, cycles=1) if options.quick else Pace()
    wrapped = zero_moved_layer if options.corrupt else None
    view.say("starting the stage processes")
    with Engine(setup.config_with(setup.source, wrap_hooks=wrapped)) as engine:
        view.on_run("moved run", engine.pids, len(setup.requests))
        moved = moved_run(engine, setup, pace, view)
        view.on_run("baselines", engine.pids, len(setup.requests) - 1)
        baselines = stop_and_copy_then_restart(engine, setup, pace, view)
    with Engine(setup.config_with(setup.source)) as engine:
        view.on_run("unmoved run", engine.pids, len(setup.requests))
        unmoved = unmoved_run(engine, setup, moved.arrivals, view)
    findings = Findings(options, setup, moved, baselines, unmoved, time.monotonic() - started)
    report = report_of(findings)
    write(report, findings, options.out)
    return report


def write(report: DemoReport, findings: Findings, folder: Path) -> None:
    """Write the three files into a folder, which is made if need be."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / REPORT).write_bytes(to_json(report))
    trace_of(findings.moved, findings.baselines, findings.unmoved).write(folder / TRACE)
    draw_timeline(report, findings.moved, findings.baselines, folder / TIMELINE)


def to_json(report: DemoReport) -> bytes:
    """The report as indented JSON."""
    content = {"ok": report.ok, "verdict": report.verdict, **msgspec.to_builtins(report)}
    return msgspec.json.format(msgspec.json.encode(content), indent=2) + b"\n"


def report_of(findings: Findings) -> DemoReport:
    """Make numbers of what was recorded."""
    options, setup, moved = findings.options, findings.setup, findings.moved
    gaps = measure.gaps_of(moved.recorder)
    table = measure.gap_table(gaps)
    switches = tuple(
        measure.move_report(
            switch,
            moved.recorder,
            gaps,
            table.noop,
            sum(arrival.move == switch.name for arrival in moved.arrivals),
        )
        for switch in moved.recorder.switchovers
    )
    held = findings.baselines.recorder
    held_gaps = measure.gaps_of(held)
    stop_and_copy = measure.move_report(held.switchovers[0], held, held_gaps, table.noop, 0)
    requests = tuple(_request(findings, number) for number in range(len(setup.requests)))
    peaks = moved.recorder.peak_bytes()
    report = DemoReport(
        version=build_info().version,
        model=setup.name,
        dtype=DTYPE,
        transport=", ".join(
            sorted({s.transport for move in switches for s in move.stages if s.transport})
        ),
        corrupted=options.corrupt,
        cores=len(os.sched_getaffinity(0)),
        placements=(setup.source.counts, setup.target.counts),
        moved=_run(moved),
        unmoved=_run(findings.unmoved),
        moves=tuple(switch for switch in switches if switch.mode == "live"),
        noops=tuple(switch for switch in switches if switch.mode == "no-op"),
        stop_and_copy=stop_and_copy,
        restart=findings.baselines.restart,
        tpot=measure.tpot_of(moved.recorder, gaps),
        memory=tuple(
            StageMemory(rank, process, setup.budget_bytes, peak, peak <= setup.budget_bytes)
            for rank, (process, peak) in enumerate(zip(moved.processes, peaks, strict=False))
        ),
        requests=requests,
        tokens_identical=sum(request.identical for request in requests),
        seconds=findings.seconds,
    )
    report.warnings += _warnings(report, bool(moved.arrivals))
    return report


def _run(outcome: Outcome) -> RunReport:
    recorder = outcome.recorder
    seconds = recorder.ended - recorder.started
    return RunReport(
        seconds=seconds,
        steps=len(recorder.steps),
        tokens=len(recorder.tokens),
        tokens_per_second=len(recorder.tokens) / seconds,
        processes=outcome.processes,
        gaps=measure.gap_table(measure.gaps_of(recorder)),
    )


def _request(findings: Findings, number: int) -> RequestReport:
    setup, moved = findings.setup, findings.moved
    one = [token.token for token in moved.recorder.tokens_of(number)]
    other = [token.token for token in findings.unmoved.recorder.tokens_of(number)]
    arrival = next((found for found in moved.arrivals if found.request == number), None)
    difference = measure.first_difference(one, other)
    return RequestReport(
        request=number,
        prompt_tokens=len(setup.requests[number].prompt),
        new_tokens=len(one),
        arrival_step=arrival.step if arrival is not None else 0,
        arrived_in=f"{arrival.move}, {arrival.phase}" if arrival is not None else "",
        sha256_moved=measure.token_hash(one),
        sha256_unmoved=measure.token_hash(other),
        identical=difference < 0,
        first_difference=difference,
        text=setup.decode(one),
    )


def _warnings(report: DemoReport, arrived: bool) -> list[str]:
    """What the run was meant to show and did not."""
    found: list[str] = []
    for move in report.moves:
        if move.decoding < len(report.requests) - 1:
            found.append(
                f"{move.name}: only {move.decoding} of {len(report.requests)} requests were still "
                "decoding at the switchover; --new-tokens was too small for this machine"
            )
    if not arrived:
        found.append("no request arrived in the middle of a move")
    if any(move.gap == Gaps() for move in report.moves):
        found.append("a switchover fell into steps shared with a prompt: no gap to compare")
    found += [
        f"stage {memory.stage} held {memory.peak_bytes} bytes, above its budget"
        for memory in report.memory
        if not memory.ok
    ]
    return found

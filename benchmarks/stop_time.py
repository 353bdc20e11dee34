"""Stop time of live moves of layers, against switchovers that move nothing and against no move.

The reference engine decodes all the time while layers move back and forth. For every step, on every
stage, three things are taken apart:

* *delay*: from the moment the stage could have begun the step (its last step has ended, and the
  step whose result the driver waited for is done) to the moment it began it, plus activation;
* *gate*: what the step then waited for the KV of a gained layer;
* of the gate, the part *in flight*: until the source had ended the last step of the old placement.

Stop time is delay plus gate less the part in flight, the worst stage counting. The stage's own
measure is beside it: gate wait plus activation. Differences to switchovers that move nothing come
with bootstrap intervals (95 %) over the switchovers.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

from common import (
    SPREAD_HEAD,
    Figure,
    Result,
    Spread,
    Table,
    difference,
    finish,
    number,
    parser,
    percentile,
)
from engine_load import LoadedEngine, Script, engine_config, model_folder
from pipelive_kv import MigrationOptions, Placement, Report
from pipelive_kv.engines.reference import Engine, StepRecord
from pipelive_kv.engines.transformers import TransformersModel

KINDS = ("live", "no-op", "steady", "baseline")


@dataclass(frozen=True)
class Switch:
    """One reconfiguration that was made."""

    kind: str
    report: Report
    hold_s: float
    """What the scheduler waited for the decision."""


@dataclass(frozen=True)
class Stop:
    """Seconds, of the worst stage each."""

    delay: float
    gate: float
    in_flight: float
    total: float
    inside: float


@dataclass
class Session:
    """What was done; ``baseline`` counts the steps before and after the unmoved stretch."""

    switches: list[Switch] = field(default_factory=list)
    baseline: tuple[int, int] = (0, 0)


def moves(load: LoadedEngine, arguments: argparse.Namespace, session: Session) -> Script:
    """Back and forth, a no-op switchover after each move."""
    engine = load.engine
    here = engine.config.placement
    there = Placement.from_counts(arguments.target)
    yield from load.wait_steps(2 * arguments.settle)
    before = len(load.steps)
    yield from load.wait_steps(arguments.baseline)
    session.baseline = (before, len(load.steps))
    for index in range(arguments.warm + arguments.moves):
        target = there if engine.placement == here else here
        for kind, placement in (("live", target), ("no-op", target)):
            held = engine.scheduler.hold_seconds
            job = engine.reconfigure(
                placement, options=MigrationOptions(max_stop_ms=arguments.max_stop_ms)
            )
            yield from load.wait_until(lambda job=job: job.phase.is_final)
            report = job.wait(0)
            held = engine.scheduler.hold_seconds - held
            if index >= arguments.warm:
                session.switches.append(Switch(kind, report, held))
            yield from load.wait_steps(arguments.settle)


def stop_of(load: LoadedEngine, step: StepRecord, report: Report | None) -> Stop | None:
    """What a step waited; None where it is not known what it waited for."""
    before = load.steps.get(step.seq - 1)
    freed = load.steps.get(step.seq - load.engine.config.lanes)
    if before is None or freed is None:
        return None
    switched = {stage.rank: stage for stage in report.stages} if report is not None else {}
    worst = Stop(0, 0, 0, 0, report.stop_s if report is not None else 0.0)
    for stage in step.stages:
        ready = max(before.stages[stage.rank].end, freed.done)
        delay, in_flight = max(0.0, stage.begin - ready), 0.0
        if report is not None:
            delay += switched[stage.rank].activate_s
            in_flight = _in_flight(stage.rank, stage.gate, before, report)
        total = delay + stage.gate - in_flight
        worst = Stop(
            max(worst.delay, delay),
            max(worst.gate, stage.gate),
            max(worst.in_flight, in_flight),
            max(worst.total, total),
            worst.inside,
        )
    return worst


def _in_flight(rank: int, gate: float, before: StepRecord, report: Report) -> float:
    """The part of a gate's wait in which a source had not ended its last step of the old placement.

    The gate opens when the source's last round is applied, so what lies between the end of that
    step and the end of that round was not in flight; the source hears of it a little later than the
    gate, which counts against us.
    """
    tail = 0.0
    for move in report.moves:
        if move.target != rank:
            continue
        source = next(stage for stage in report.stages if stage.rank == move.source)
        last = max(record.end_ns for record in source.rounds) * 1e-9
        tail = max(tail, last - before.stages[move.source].end)
    return max(0.0, gate - max(0.0, tail))


def evaluate(load: LoadedEngine, session: Session) -> Result:
    """Tables and figures."""
    result, switches = Result("stop_time"), session.switches
    at = {switch.report.step: switch for switch in switches}
    spans = [(s.report.phases[0].start_ns * 1e-9, s.report.phases[-1].end_ns * 1e-9)
             for s in switches]  # fmt: skip
    first, last = session.baseline
    ordered = sorted(load.steps)
    baseline = (ordered[first], ordered[last - 1])

    def kind_of(low: int, high: int) -> str:
        for seq in range(low + 1, high + 1):
            if seq in at:
                return at[seq].kind
        if baseline[0] < low and high <= baseline[1]:
            return "baseline"
        start, end = load.steps[low].issued, load.steps[high].done
        return "moving" if any(a < end and b > start for a, b in spans) else "steady"

    stops: dict[str, list[Stop]] = {kind: [] for kind in (*KINDS, "moving")}
    for seq, step in load.steps.items():
        if step.kind != "decode" or seq - 1 not in load.steps:
            continue
        report = at[seq].report if seq in at else None
        stop = stop_of(load, step, report)
        if stop is not None:
            stops[kind_of(seq - 1, seq)].append(stop)
    gaps: dict[str, list[float]] = {kind: [] for kind in (*KINDS, "moving")}
    by_switch: dict[int, list[float]] = {step: [] for step in at}
    for before, token in load.gaps():
        if before.seq in load.steps and token.seq in load.steps:
            gaps[kind_of(before.seq, token.seq)].append(token.at - before.at)
            for seq in range(before.seq + 1, token.seq + 1):
                if seq in at:
                    by_switch[seq].append(token.at - before.at)
    _tables(result, switches, stops, gaps)
    _inside(result, switches)
    _excess(result, switches, by_switch, load)
    return result


_ORDER = ("mean", "p50", "p90", "p99")
_STATISTICS = {
    "mean": lambda values: float(values.mean()),
    "p50": percentile(0.5),
    "p90": percentile(0.9),
    "p99": percentile(0.99),
}


def _inside(result: Result, switches: list[Switch]) -> None:
    """Gate wait plus activation as the stages measure it, against no-op switchovers."""
    of = {k: [s.report for s in switches if s.kind == k] for k in ("live", "no-op")}
    stop = {kind: Spread.of(report.stop_s for report in found) for kind, found in of.items()}
    samples = [[[report.stop_s] for report in of[kind]] for kind in ("live", "no-op")]
    excess = {name: difference(*samples, _STATISTICS[name], seed=1) for name in _ORDER}
    actual = [report.actual_stop for report in of["live"]]
    predicted = [report.predicted_stop for report in of["live"]]
    rows = [
        ("stop of a live move: gate wait plus activation", [r.stop_s for r in of["live"]]),
        ("stop of a switchover that moves nothing", [r.stop_s for r in of["no-op"]]),
        ("of live moves: activation", [a.activate_s for a in actual]),
        ("of live moves: gate wait for steps in flight", [a.in_flight_s for a in actual]),
        ("of live moves: gate wait for the transfer", [a.transfer_s for a in actual]),
        ("of live moves: decision, beside the stop", [a.decision_s for a in actual]),
        ("from a source's last old step to its word that all is applied",
         [max(s.tail_s for s in r.stages) for r in of["live"]]),
        ("predicted, last before the switchover", [p.total_s for p in predicted]),
        ("predicted: fixed part", [p.fixed_s for p in predicted]),
        ("predicted: bytes", [p.bytes_s for p in predicted]),
        ("predicted: records", [p.records_s for p in predicted]),
    ]  # fmt: skip
    result.tables.append(Table(
        "Stop time as the stages measure it, and as it was predicted, ms", ("part", *SPREAD_HEAD),
        [[name, *Spread.of(values).cells(1e3)] for name, values in rows],
        "Stop of a live move less that of one that moves nothing, 95 % intervals: "
        + ", ".join(f"{name} {excess[name].text(1e3)}" for name in _ORDER) + " ms.",
    ))  # fmt: skip
    noop = f"no-op: p50 {number(stop['no-op'].p50 * 1e3)}, p99 {number(stop['no-op'].p99 * 1e3)} ms"
    result.figures.append(Figure(
        "gate wait plus activation, p50", stop["live"].p50 * 1e3, "ms", "at most 1 ms", noop,
        stop["live"].p50 <= 1e-3,
        f"beyond no-op {excess['p50'].text(1e3)}, n = {stop['live'].count}",
    ))  # fmt: skip
    beyond = stop["live"].p99 - stop["no-op"].p99
    result.figures.append(Figure(
        "gate wait plus activation beyond that of no-op switchovers, p99", beyond * 1e3, "ms",
        "at most 1 ms", noop, beyond <= 1e-3,
        f"95 %: {excess['p99'].text(1e3)}; live p99 {number(stop['live'].p99 * 1e3)}",
    ))  # fmt: skip


def _excess(
    result: Result, switches: list[Switch], gaps: dict[int, list[float]], load: LoadedEngine
) -> None:
    """Token gaps against those of no-op switchovers, and what gates leave a stage idle."""
    samples = [[gaps[s.report.step] for s in switches if s.kind == k] for k in ("live", "no-op")]
    excess = {name: difference(*samples, _STATISTICS[name], seed=2) for name in _ORDER}
    result.tables.append(Table(
        "Token gaps at live switchovers less those at no-op ones, ms",
        ("statistic", "difference (95 %)"),
        [[name, excess[name].text(1e3)] for name in _ORDER],
        "Whole switchovers are resampled; an interval that holds 0 shows no difference.",
    ))  # fmt: skip
    seconds = load.steps[max(load.steps)].done - load.steps[min(load.steps)].issued
    moves = max(1, sum(s.kind == "live" for s in switches))
    ranks = range(len(next(iter(load.steps.values())).stages))
    idle = {rank: sum(s.stages[rank].gate for s in load.steps.values()) for rank in ranks}
    result.tables.append(Table(
        "Idle at gates", ("stage", "ms per live move", "share of the run"),
        [[str(rank), number(idle[rank] / moves * 1e3), f"{100 * idle[rank] / seconds:.4f} %"]
         for rank in ranks],
        "What the engine's thread spends in gates, over all steps, waiting or not.",
    ))  # fmt: skip


def _tables(
    result: Result,
    switches: list[Switch],
    stops: dict[str, list[Stop]],
    gaps: dict[str, list[float]],
) -> None:
    names = {
        "live": "switchover of a live move",
        "no-op": "switchover that moves nothing",
        "moving": "steps while a reconfiguration is under way",
        "steady": "steps between reconfigurations",
        "baseline": "steps before any reconfiguration",
    }
    result.tables.append(Table(
        "Stop time beyond the steps in flight, ms", ("step", *SPREAD_HEAD),
        [[name, *Spread.of(stop.total for stop in stops[kind]).cells(1e3)]
         for kind, name in names.items()],
        "An ordinary step has such a delay too: the way of its message to the stage.",
    ))  # fmt: skip
    live = stops["live"]
    held = [switch.hold_s for switch in switches if switch.kind == "live"]
    parts = [
        ("delay until the step begins, with activation", [stop.delay for stop in live]),
        ("gate, all of it", [stop.gate for stop in live]),
        ("gate, the part for steps in flight", [stop.in_flight for stop in live]),
        ("gate plus activation as the report has it", [stop.inside for stop in live]),
        ("scheduler's wait for the decision (within the delay)", held),
    ]
    result.tables.append(Table(
        "Live moves: what the stop consists of, ms", ("part", *SPREAD_HEAD),
        [[name, *Spread.of(values).cells(1e3)] for name, values in parts],
    ))  # fmt: skip
    result.tables.append(Table(
        "Gaps between two tokens of a request, ms", ("gap", *SPREAD_HEAD),
        [[name.replace("steps", "gaps"), *Spread.of(gaps[kind]).cells(1e3)]
         for kind, name in names.items()],
        "Gaps that share the pipeline with a prompt are left out.",
    ))  # fmt: skip
    reports = [switch.report for switch in switches if switch.kind == "live"]
    rows = [
        ("seconds per move", [report.seconds for report in reports]),
        ("MB of KV per move", [report.bytes_moved / 1e6 for report in reports]),
        ("rounds per move", [float(len(report.rounds)) for report in reports]),
    ]
    result.tables.append(Table(
        "The moves", ("what", *SPREAD_HEAD),
        [[name, *Spread.of(values).cells()] for name, values in rows],
    ))  # fmt: skip
    total, noop = Spread.of(s.total for s in live), Spread.of(s.total for s in stops["no-op"])
    usual = Spread.of(s.total for s in stops["baseline"])
    limit = (
        f"no-op switchover {number(noop.p50 * 1e3)} ms, ordinary step "
        f"{number(usual.p50 * 1e3)} ms (p50)"
    )
    p99 = f"p90 {number(total.p90 * 1e3)}, p99 {number(total.p99 * 1e3)} ms, n = {total.count}"
    result.figures.append(Figure(
        "stop time beyond the steps in flight, p50", total.p50 * 1e3, "ms", "under 10 ms", limit,
        total.p50 < 10e-3, p99,
    ))  # fmt: skip
    result.figures.append(Figure(
        "stop time beyond the steps in flight, p99", total.p99 * 1e3, "ms", "", limit, None, p99,
    ))  # fmt: skip
    outside = Spread.of(gaps["live"]), Spread.of(gaps["no-op"]), Spread.of(gaps["baseline"])
    excess = outside[0].p50 - outside[1].p50
    result.figures.append(Figure(
        "token gap at a live switchover beyond that at a no-op one, p50", excess * 1e3, "ms",
        "under 10 ms", f"gap without any move {number(outside[2].p50 * 1e3)} ms (p50)",
        excess < 10e-3, f"p99 {number((outside[0].p99 - outside[1].p99) * 1e3)} ms",
    ))  # fmt: skip
    result.data = {
        kind: [[s.delay, s.gate, s.in_flight, s.total, s.inside] for s in stops[kind]]
        for kind in ("live", "no-op")
    }


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--model", default="smollm2", help='"smollm2", "tiny" or a folder')
    made.add_argument("--moves", type=int, default=200, help="live moves, and as many no-ops")
    made.add_argument("--warm", type=int, default=2, help="moves before those that count")
    made.add_argument("--source", type=int, nargs="+", help="layers per stage; default 3:2")
    made.add_argument("--target", type=int, nargs="+", help="layers per stage; default 2:3")
    made.add_argument("--batch", type=int, default=4, help="requests per lane; there are two lanes")
    made.add_argument("--tokens", type=int, default=384, help="new tokens of each request")
    made.add_argument("--baseline", type=int, default=100, help="steps before the first move")
    made.add_argument("--settle", type=int, default=4, help="steps between reconfigurations")
    made.add_argument("--max-stop-ms", type=float, default=10.0)
    made.add_argument("--transport", default="auto", choices=("auto", "shm", "tcp"))
    arguments = made.parse_args()
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="pipelive-bench-") as scratch:
        folder = model_folder(arguments.model, Path(scratch))
        layers = TransformersModel(folder, dtype="float32").num_layers
        more = -(-3 * layers // 5)
        arguments.source = arguments.source or [more, layers - more]
        arguments.target = arguments.target or [layers - more, more]
        config = engine_config(
            folder,
            Placement.from_counts(arguments.source),
            arguments.batch,
            max_tokens=arguments.tokens + 64,
            transport=arguments.transport,
        )
        session = Session()
        with Engine(config) as engine:
            load = LoadedEngine(engine, new_tokens=arguments.tokens, seed=arguments.seed)
            load.play(moves(load, arguments, session))
    finish(evaluate(load, session), arguments, started)


if __name__ == "__main__":
    main()

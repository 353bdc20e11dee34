"""Makes numbers of what was recorded."""

from __future__ import annotations

import bisect
import hashlib
import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from pipelive_kv.demo.recorder import Recorder, Switchover, Token
from pipelive_kv.demo.report import (
    Gaps,
    GapTable,
    MoveReport,
    PhaseReport,
    RoundReport,
    StageSwitch,
    Tpot,
)

KINDS = ("steady", "moving", "switchover", "noop", "prefill")


@dataclass(frozen=True)
class Gap:
    """The time between two tokens of a request.

    Attributes:
        seconds: how long.
        end: when the second token came.
        kind: one of :data:`KINDS`.
        with_prefill: whether a prompt's step ran meanwhile.
        name: of the switchover that it fell into; empty where there was none.
    """

    request: int
    seconds: float
    end: float
    kind: str
    with_prefill: bool
    name: str


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least ``share`` of the values do not exceed; 0 of none."""
    if not values:
        return 0.0
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def spread(gaps: Iterable[Gap]) -> Gaps:
    """How gaps are spread."""
    found = [gap.seconds * 1e3 for gap in gaps]
    if not found:
        return Gaps()
    return Gaps(len(found), percentile(found, 0.5), percentile(found, 0.99), max(found))


def token_hash(tokens: Sequence[int]) -> str:
    """SHA-256 of tokens as little-endian 32-bit numbers."""
    return hashlib.sha256(b"".join(token.to_bytes(4, "little") for token in tokens)).hexdigest()


def first_difference(one: Sequence[int], other: Sequence[int]) -> int:
    """The first index at which two sequences differ, -1 if they are the same."""
    for index, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            return index
    return -1 if len(one) == len(other) else min(len(one), len(other))


def gaps_of(recorder: Recorder) -> list[Gap]:
    """All gaps between two tokens of a request, each with its kind.

    A switchover falls into the gap that ends with the request's first token of the new placement:
    the step's number decides that, not the clock, since steps of both placements are under way at
    once.
    """
    prefills = sorted(
        (step.stages[0].start, step.done) for step in recorder.steps if step.kind == "prefill"
    )
    starts = [start for start, _ in prefills]
    longest = max((end - start for start, end in prefills), default=0.0)
    moving = [
        (span[0], span[1])
        for switch in recorder.switchovers
        if switch.mode == "live" and (span := span_of(switch)) is not None
    ]
    found: list[Gap] = []
    for request in recorder.requests:
        tokens = recorder.tokens_of(request)
        for last, token in itertools.pairwise(tokens):
            first = bisect.bisect_left(starts, last.at - longest)
            shared = any(
                end > last.at and start < token.at
                for start, end in prefills[first : bisect.bisect_right(starts, token.at)]
            )
            switch = _switch_between(recorder.switchovers, last, token)
            if switch is not None:
                kind = "noop" if switch.mode == "no-op" else "switchover"
            elif shared:
                kind = "prefill"
            elif any(start < token.at and end > last.at for start, end in moving):
                kind = "moving"
            else:
                kind = "steady"
            name = switch.name if switch is not None else ""
            found.append(Gap(request, token.at - last.at, token.at, kind, shared, name))
    return found


def _switch_between(
    switchovers: Sequence[Switchover], last: Token, token: Token
) -> Switchover | None:
    """The switchover between two tokens of a request; one that moves layers wins."""
    found = [s for s in switchovers if last.seq < s.report.step <= token.seq]
    return min(found, key=lambda s: s.mode == "no-op", default=None)


def gap_table(gaps: Sequence[Gap]) -> GapTable:
    """The gaps by kind."""
    by_kind = {
        kind: spread(
            gap for gap in gaps if gap.kind == kind and (kind == "prefill" or not gap.with_prefill)
        )
        for kind in KINDS
    }
    return GapTable(**by_kind)


def span_of(switch: Switchover) -> tuple[float, float] | None:
    """From when to when a reconfiguration was under way, in seconds."""
    phases = switch.report.phases
    if not phases:
        return None
    return phases[0].start_ns * 1e-9, phases[-1].end_ns * 1e-9


def tpot_of(recorder: Recorder, gaps: Sequence[Gap]) -> Tpot:
    """Mean time per token before the first move, during moves and after the last one."""
    spans = [
        span
        for switch in recorder.switchovers
        if switch.mode == "live" and (span := span_of(switch)) is not None
    ]
    first = min((start for start, _ in spans), default=recorder.ended)
    last = max((end for _, end in spans), default=recorder.ended)
    clean = [gap for gap in gaps if not gap.with_prefill]

    def mean(chosen: list[Gap]) -> float:
        return 1e3 * sum(gap.seconds for gap in chosen) / len(chosen) if chosen else 0.0

    return Tpot(
        before_ms=mean([gap for gap in clean if gap.end < first and gap.kind == "steady"]),
        during_ms=mean([gap for gap in clean if gap.kind in ("moving", "switchover")]),
        after_ms=mean([gap for gap in clean if gap.end - gap.seconds > last]),
    )


def move_report(
    switch: Switchover, recorder: Recorder, gaps: Sequence[Gap], noop: Gaps, arrivals: int
) -> MoveReport:
    """What one reconfiguration was and cost.

    Args:
        noop: the gaps at switchovers that change nothing, to compare with.
        arrivals: requests that arrived meanwhile.
    """
    report, zero = switch.report, recorder.started
    around = spread(gap for gap in gaps if gap.name == switch.name and not gap.with_prefill)
    stages = tuple(
        StageSwitch(
            stage=stage.rank,
            activate_ms=stage.activate_s * 1e3,
            gate_ms=stage.gate_s * 1e3,
            idle_ms=max(0.0, (stage.first_new_start_ns - stage.last_old_end_ns) * 1e-6),
            transport=stage.transport,
        )
        for stage in report.stages
    )
    stop_ms = report.stop_s * 1e3
    if switch.mode == "stop_and_copy":
        stop_ms = max((stage.idle_ms + stage.gate_ms for stage in stages), default=0.0)
    known = bool(around.count and noop.count)
    return MoveReport(
        name=switch.name,
        mode=switch.mode,
        old=report.old.counts,
        new=report.new.counts,
        layers_moved=tuple(sorted(layer for move in report.moves for layer in move.layers)),
        epoch=report.epoch,
        step=report.step,
        start_s=report.phases[0].start_ns * 1e-9 - zero if report.phases else 0.0,
        seconds=report.seconds,
        stop_ms=stop_ms,
        stop_predicted_ms=report.predicted_stop_s * 1e3,
        gap=around,
        gap_excess_p50_ms=around.p50_ms - noop.p50_ms if known else 0.0,
        gap_excess_max_ms=around.max_ms - noop.max_ms if known else 0.0,
        decoding=switch.decoding,
        arrivals=arrivals,
        bytes=report.bytes_moved,
        rounds=tuple(
            RoundReport(
                stage=stage.rank,
                number=record.number,
                through_seq=record.through_seq,
                dirty_slots=record.slots,
                bytes=record.bytes,
                records=record.records,
                lag_steps=record.lag_steps,
                start_s=record.start_ns * 1e-9 - zero,
                ms=(record.end_ns - record.start_ns) * 1e-6,
                busy_ms=record.busy_s * 1e3,
            )
            for stage in report.stages
            for record in stage.rounds
        ),
        phases=tuple(
            PhaseReport(
                span.phase.value, span.start_ns * 1e-9 - zero, (span.end_ns - span.start_ns) * 1e-9
            )
            for span in report.phases
        ),
        stages=stages,
        capacity=(report.capacity_before, report.capacity_during, report.capacity_after),
        blocks_remapped=report.blocks_moved,
    )

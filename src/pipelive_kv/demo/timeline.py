"""The demo's picture: what each stage ran, how patching converged, memory and throughput."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipelive_kv.demo.baselines import Baselines
from pipelive_kv.demo.recorder import Recorder, Switchover
from pipelive_kv.demo.report import DemoReport, MoveReport
from pipelive_kv.demo.scenario import Outcome

STEP_COLORS = {"decode": "#4c78a8", "prefill": "#f2b447", "empty": "#c9c9c9"}
LIVE, NOOP, HELD = "#d1495b", "#8d99a6", "#7b4fa3"
STAGE_COLORS = (
    *("#2a7f9e", "#e07b39", "#5b8c5a", "#8a5aa8"),
    *("#b0413e", "#6b7a8f", "#c2a83e", "#444444"),
)
PHASE_COLORS = {
    "planned": "#dfe5ea",
    "admitted": "#c4d3de",
    "staging": "#f5d9a8",
    "patching": "#f2b8a0",
    "write_through": "#f5cdb0",
    "armed": "#e58f8a",
    "switching": "#e3a6c0",
    "releasing": "#b9d8b4",
}
INK, FAINT = "#20262d", "#6a737d"


def draw_timeline(report: DemoReport, moved: Outcome, baselines: Baselines, path: Path) -> None:
    """Draw the picture and write it as a PNG of about 2000 x 1700 pixels."""
    import matplotlib  # noqa: PLC0415

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt  # noqa: PLC0415

    style: Any = {
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.edgecolor": FAINT,
        "axes.labelcolor": INK,
        "axes.titlesize": 10,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "text.color": INK,
        "xtick.color": FAINT,
        "ytick.color": FAINT,
    }
    with plt.rc_context(style):
        figure = plt.figure(figsize=(16, 13.5), dpi=125)
        grid = figure.add_gridspec(
            4, 6, height_ratios=(1.15, 1.35, 1.2, 1.5), hspace=0.5, wspace=0.75,
            left=0.06, right=0.94, top=0.885, bottom=0.045,
        )  # fmt: skip
        _heading(figure, report)
        _overview(figure.add_subplot(grid[0, :]), report, moved.recorder)
        _zooms(figure, grid, report, moved.recorder, baselines.recorder)
        live = [s for s in moved.recorder.switchovers if s.mode == "live"]
        # With more than two moves, the first one (a request arrives) and the last one are shown.
        for index, number in enumerate((0, len(live) - 1) if live else ()):
            axis = figure.add_subplot(grid[2, 3 * index : 3 * index + 3])
            _rounds(axis, report.moves[number], live[number], moved.recorder)
        _memory(figure.add_subplot(grid[3, :]), report, moved.recorder)
        figure.savefig(path)
        plt.close(figure)


def _heading(figure: Any, report: DemoReport) -> None:
    old, new = ("/".join(map(str, counts)) for counts in report.placements)
    figure.text(
        0.06, 0.965, f"{report.model}: layers {old} to {new} and back while every request decodes",
        fontsize=16, weight="bold",
    )  # fmt: skip
    stops = ", ".join(f"{move.stop_ms:.1f} ms" for move in report.moves)
    sent = ", ".join(f"{move.bytes / 1e6:.1f} MB" for move in report.moves)
    figure.text(
        0.06, 0.942,
        f"stop time {stops}  ·  stop-and-copy {report.stop_and_copy.stop_ms:.0f} ms  ·  "
        f"restart {report.restart.stop_ms / 1e3:.1f} s  ·  KV copied {sent}  ·  "
        f"transport {report.transport or '-'}",
        fontsize=11, color=FAINT,
    )  # fmt: skip
    figure.text(
        0.94, 0.965, report.verdict, fontsize=14, weight="bold", ha="right",
        color="#2e7d4f" if report.ok else LIVE,
    )  # fmt: skip


def _overview(axis: Any, report: DemoReport, recorder: Recorder) -> None:
    zero = recorder.started
    ranks = range(len(report.placements[0]))
    _draw_steps(axis, recorder, zero, ranks)
    end = recorder.ended - zero
    marks: list[tuple[float, Switchover]] = []
    for switch in recorder.switchovers:
        at = _switch_time(switch) - zero
        marks.append((at, switch))
        _span(axis, switch, zero)
        is_live = switch.mode == "live"
        axis.axvline(at, color=LIVE if is_live else NOOP, lw=1.6 if is_live else 0.9,
                     ls="-" if is_live else (0, (3, 2)))  # fmt: skip
        if is_live:
            axis.annotate(
                f"{switch.name}\nstep {switch.report.step}", (at, len(ranks) - 0.42),
                xytext=(4, 2), textcoords="offset points", color=LIVE, fontsize=8, va="bottom",
                annotation_clip=False,
            )  # fmt: skip
    placements = [report.placements[0], *(s.report.new.counts for _, s in marks)]
    edges = [0.0, *(at for at, _ in marks), end]
    spans: list[tuple[float, float, tuple[int, ...]]] = []
    for start, stop, counts in zip(edges, edges[1:], placements, strict=False):
        if spans and spans[-1][2] == counts:
            start = spans.pop()[0]  # noqa: PLW2901 - a switchover that changed nothing
        spans.append((start, stop, counts))
    for start, stop, counts in spans:
        for rank in ranks:
            axis.text(
                (start + stop) / 2, len(ranks) - 1 - rank + 0.39, f"{counts[rank]} layers",
                ha="center", va="bottom", fontsize=8, color=INK,
            )  # fmt: skip
    axis.set_xlim(0, end)
    axis.set_ylim(-0.5, len(ranks) - 0.3)
    axis.set_title("Steps of each stage  (shaded: a move is under way)", pad=16)
    axis.set_xlabel("seconds since the first request")
    _legend(axis)


def _zooms(figure: Any, grid: Any, report: DemoReport, moved: Recorder, held: Recorder) -> None:
    """The same stretch of time around three switchovers."""
    chosen: list[tuple[str, str, Recorder, Switchover]] = []
    noop = [s for s in moved.switchovers if s.mode == "no-op"]
    live = [s for s in moved.switchovers if s.mode == "live"]
    # Of the moves in the direction of the stop-and-copy, the last one: no prompt runs next to it.
    live = [s for s in live if s.report.new.counts == report.placements[1]]
    for title, color, recorder, found in (
        ("Switchover that changes nothing", NOOP, moved, noop[-1:]),
        (f"Live switchover: {live[-1].name}" if live else "", LIVE, moved, live[-1:]),
        ("Stop-and-copy", HELD, held, held.switchovers[:1]),
    ):
        chosen += [(title, color, recorder, switch) for switch in found]
    idle = [stage.idle_ms for stage in report.stop_and_copy.stages]
    before, after = 0.35, 0.45 + max(idle, default=0.0) / 1e3
    ranks = range(len(report.placements[0]))
    for index, (title, color, recorder, switch) in enumerate(chosen):
        axis = figure.add_subplot(grid[1, 2 * index : 2 * index + 2])
        at = min(stage.last_old_end_ns for stage in switch.report.stages) * 1e-9
        _draw_steps(axis, recorder, at, ranks, scale=1e3, window=(at - before, at + after))
        _draw_tokens(axis, recorder, at, (at - before, at + after), switch.report.step)
        for stage in switch.report.stages:
            row = len(ranks) - 1 - stage.rank
            x = (stage.first_new_start_ns * 1e-9 - at) * 1e3
            axis.plot([x, x], [row - 0.4, row + 0.4], color=color, lw=2.2)
        axis.set_xlim(-before * 1e3, after * 1e3)
        axis.set_title(title, color=color)
        axis.set_xlabel("ms; coloured bars: first step of the new placement")


def _rounds(axis: Any, move: MoveReport, switch: Switchover, recorder: Recorder) -> None:
    zero = switch.report.phases[0].start_ns * 1e-9
    start = zero - recorder.started
    top = max([1.0, *(float(r.dirty_slots) for r in move.rounds)]) * 3
    for phase in move.phases:
        color = PHASE_COLORS.get(phase.name)
        if color is None or not phase.seconds:
            continue
        left = phase.start_s - start
        axis.axvspan(left, left + phase.seconds, ymin=0.93, color=color, lw=0)
        if phase.seconds > 0.08 * move.seconds:
            axis.text(left + phase.seconds / 2, 0.955, phase.name, ha="center", va="center",
                      fontsize=7.5, transform=axis.get_xaxis_transform())  # fmt: skip
    for record in move.rounds:
        left = record.start_s - start
        color = "#f2b447" if record.number == 0 else STAGE_COLORS[record.stage]
        axis.bar(left, max(record.dirty_slots, 0.5), width=max(record.ms / 1e3, move.seconds / 250),
                 align="edge", color=color, lw=0)  # fmt: skip
    axis.axvline(_switch_time(switch) - zero, color=LIVE, lw=1.4)
    axis.set_yscale("log")
    axis.set_ylim(0.5, top)
    axis.set_xlim(0, move.seconds)
    axis.set_ylabel("slots sent in a round (log)")
    axis.set_xlabel(f"seconds since {move.name} was asked for")
    first = next((r.dirty_slots for r in move.rounds if r.number == 0), 0)
    axis.set_title(
        f"Patching, {move.name}: bulk copy of {first} slots, then "
        f"{sum(r.number > 0 for r in move.rounds)} rounds; layers "
        f"{min(move.layers_moved)} to {max(move.layers_moved)}"
    )
    other = axis.twinx()
    points = [
        (sample.at - zero, max(stage.lag_steps for stage in sample.stages))
        for sample in recorder.samples
        if 0 <= sample.at - zero <= move.seconds
    ]
    other.plot([x for x, _ in points], [y for _, y in points], color=INK, lw=1.0, marker=".", ms=4)
    other.set_ylim(0, max([4.0, *(1.15 * y for _, y in points)]))
    other.set_ylabel("lag in steps (line)")
    other.spines["right"].set_visible(True)


def _memory(axis: Any, report: DemoReport, recorder: Recorder) -> None:
    zero, end = recorder.started, recorder.ended - recorder.started
    times = [sample.at - zero for sample in recorder.samples]
    for memory in report.memory:
        used = [s.stages[memory.stage].used_bytes / 2**20 for s in recorder.samples]
        axis.step(times, used, where="post", lw=2.0, color=STAGE_COLORS[memory.stage],
                  label=f"stage {memory.stage}, process {memory.process}")  # fmt: skip
    budget = max((memory.budget_bytes for memory in report.memory), default=0) / 2**20
    axis.axhline(budget, color=INK, lw=1.2, ls=(0, (5, 3)))
    axis.annotate(f"budget of each stage: {budget:.0f} MiB", (0, budget), xytext=(4, 3),
                  textcoords="offset points", fontsize=8)  # fmt: skip
    for switch in recorder.switchovers:
        if switch.mode == "live":
            axis.axvline(_switch_time(switch) - zero, color=LIVE, lw=1.2)
            _span(axis, switch, zero)
    other = axis.twinx()
    width = 0.5
    counts = [0] * (int(end / width) + 1)
    for token in recorder.tokens:
        counts[min(int((token.at - zero) / width), len(counts) - 1)] += 1
    other.fill_between(
        [i * width for i in range(len(counts))], [count / width for count in counts],
        step="post", color="#4c78a8", alpha=0.18, lw=0,
    )  # fmt: skip
    other.set_ylabel("tokens per second (area)")
    other.set_ylim(0, 2.2 * max([1.0, *(count / width for count in counts)]))
    other.spines["right"].set_visible(True)
    axis.set_ylim(0, budget * 1.12 or 1)
    axis.set_xlim(0, end)
    axis.set_ylabel("weights and KV, MiB")
    axis.set_xlabel("seconds since the first request")
    axis.set_title("Memory of each stage against its budget, and throughput of all requests")
    axis.set_zorder(other.get_zorder() + 1)
    axis.patch.set_visible(False)
    axis.legend(loc="lower right", frameon=False, ncols=4)


def _draw_steps(
    axis: Any,
    recorder: Recorder,
    zero: float,
    ranks: Sequence[int],
    *,
    scale: float = 1.0,
    window: tuple[float, float] | None = None,
) -> None:
    for kind, color in STEP_COLORS.items():
        for rank in ranks:
            bars = [
                ((stage.start - zero) * scale, (stage.end - stage.start) * scale)
                for step in recorder.steps
                if step.kind == kind
                for stage in step.stages
                if stage.rank == rank
                and (window is None or (stage.end > window[0] and stage.start < window[1]))
            ]
            edge = {"edgecolor": "white", "linewidth": 0.6} if window else {"linewidth": 0}
            axis.broken_barh(bars, (len(ranks) - 1 - rank - 0.32, 0.64), facecolor=color, **edge)
    axis.set_yticks([len(ranks) - 1 - rank for rank in ranks], [f"stage {rank}" for rank in ranks])
    axis.tick_params(axis="y", length=0)


def _draw_tokens(
    axis: Any, recorder: Recorder, zero: float, window: tuple[float, float], step: int
) -> None:
    """A row of ticks per request, under the stages: when its tokens came."""
    for request in recorder.requests:
        tokens = [t for t in recorder.tokens_of(request) if window[0] <= t.at <= window[1]]
        y = -0.75 - 0.14 * request
        for after, color in ((False, INK), (True, "#2e7d4f")):
            shown = [(t.at - zero) * 1e3 for t in tokens if (t.seq >= step) == after]
            axis.scatter(shown, [y] * len(shown), marker="|", s=16, color=color, lw=1.1)
    rows = max([1, *(request + 1 for request in recorder.requests)])
    axis.set_ylim(-0.85 - 0.14 * rows, None)
    axis.annotate("tokens", (0, -0.75 - 0.07 * (rows - 1)), xycoords=("axes fraction", "data"),
                  xytext=(-8, 0), textcoords="offset points", ha="right", va="center",
                  fontsize=9, color=FAINT)  # fmt: skip


def _span(axis: Any, switch: Switchover, zero: float) -> None:
    phases = switch.report.phases
    if switch.mode == "live" and phases:
        start, end = phases[0].start_ns * 1e-9 - zero, phases[-1].end_ns * 1e-9 - zero
        axis.axvspan(start, end, color=LIVE, alpha=0.09, lw=0)


def _legend(axis: Any) -> None:
    from matplotlib.patches import Patch  # noqa: PLC0415

    handles: list[Any] = [
        Patch(color=color, label=kind) for kind, color in STEP_COLORS.items() if kind != "empty"
    ]
    handles += [
        axis.plot([], [], color=LIVE, lw=1.6, label="switchover")[0],
        axis.plot([], [], color=NOOP, lw=0.9, ls=(0, (3, 2)), label="no-op switchover")[0],
    ]
    axis.legend(
        handles=handles, loc="lower right", bbox_to_anchor=(1, 1.13), ncols=4, frameon=False
    )


def _switch_time(switch: Switchover) -> float:
    """When the first stage ran the first step of the new placement."""
    return min((s.first_new_start_ns for s in switch.report.stages), default=0) * 1e-9

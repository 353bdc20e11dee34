"""The demo's last words: a table of what a move cost, and the verdict."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from pipelive_kv.demo.report import DemoReport, Gaps, MoveReport


def print_summary(report: DemoReport, console: Console, folder: Path) -> None:
    """Print the tables, the verdict and where the files are."""
    console.print()
    console.print(_stops(report))
    console.print()
    console.print(_moves(report))
    console.print()
    console.print(_gaps(report))
    console.print()
    for memory in report.memory:
        share = 100 * memory.peak_bytes / memory.budget_bytes
        console.print(
            f"memory of stage {memory.stage} (process {memory.process}): peak "
            f"{memory.peak_bytes / 2**20:.0f} MiB, {share:.0f} % of its budget of "
            f"{memory.budget_bytes / 2**20:.0f} MiB",
            highlight=False,
        )
    tpot = report.tpot
    console.print(
        f"time per output token: {tpot.before_ms:.0f} ms before, {tpot.during_ms:.0f} ms during, "
        f"{tpot.after_ms:.0f} ms after the moves",
        highlight=False,
    )
    late = [request for request in report.requests if request.arrived_in]
    for request in late:
        console.print(
            f"request {request.request} arrived at step {request.arrival_step}, in the middle of "
            f"{request.arrived_in}",
            highlight=False,
        )
    for warning in report.warnings:
        console.print(Text(f"note: {warning}", style="yellow"))
    for request in report.requests:
        if not request.identical:
            console.print(
                Text(f"request {request.request}: token {request.first_difference} differs")
            )
    console.print()
    console.print(Text(report.verdict, style="bold green" if report.ok else "bold red"))
    console.print(f"{folder}/report.json  {folder}/timeline.png  {folder}/trace.json", style="dim")


def _stops(report: DemoReport) -> Table:
    """What a request notices, the three ways of changing the placement side by side."""
    old, new = ("/".join(map(str, counts)) for counts in report.placements)
    table = Table(
        title=f"Changing {report.model} from {old} to {new} and back while "
        f"{report.moves[0].decoding} requests decode",
        title_style="bold",
        title_justify="left",
    )
    table.add_column("", no_wrap=True)
    table.add_column("stop time", justify="right", style="bold", no_wrap=True)
    table.add_column("longest gap between\ntwo tokens", justify="right")
    table.add_column("over that of\na no-op", justify="right")
    table.add_column("KV", justify="right", no_wrap=True)
    noop = report.moved.gaps.noop
    for move in report.moves:
        way = f"{'/'.join(map(str, move.old))} to {'/'.join(map(str, move.new))}"
        table.add_row(f"live, {move.name}: {way}", *_stop_cells(move), style="green")
    table.add_row("stop-and-copy", *_stop_cells(report.stop_and_copy))
    restart = report.restart
    table.add_row(
        "restart of the processes",
        f"{restart.stop_ms:,.0f} ms",
        f"{restart.stop_ms:,.0f} ms",
        f"{restart.stop_ms - noop.max_ms:+,.0f} ms",
        f"{restart.tokens_recomputed} tokens\ncomputed again",
    )
    return table


def _stop_cells(move: MoveReport) -> tuple[str, str, str, str]:
    known = move.gap.count > 0
    return (
        f"{move.stop_ms:,.1f} ms",
        f"{move.gap.max_ms:,.0f} ms" if known else "-",
        f"{move.gap_excess_max_ms:+,.0f} ms" if known else "-",
        f"{move.bytes / 1e6:.1f} MB copied",
    )


def _moves(report: DemoReport) -> Table:
    table = Table(title="The moves", title_style="bold", title_justify="left")
    names = ("", "layers", "took", "rounds", "slots:\nbulk", "\nrounds", "predicted\nstop",
             "blocks resident:\nbefore, during, after")  # fmt: skip
    for name in names:
        table.add_column(name, justify="right" if name else "left", no_wrap=True)
    for move in (*report.moves, report.stop_and_copy):
        layers = move.layers_moved
        bulk = sum(r.dirty_slots for r in move.rounds if r.number == 0)
        patched = sum(r.dirty_slots for r in move.rounds if r.number > 0)
        table.add_row(
            move.name,
            f"{layers[0]}-{layers[-1]}" if layers else "-",
            f"{move.seconds:.2f} s",
            str(len(move.rounds)),
            str(bulk),
            str(patched),
            f"{move.stop_predicted_ms:.1f} ms" if move.mode == "live" else "-",
            ", ".join(map(str, move.capacity)),
        )
    return table


def _gaps(report: DemoReport) -> Table:
    table = Table(title="Gaps between two tokens of a request", title_style="bold",
                  title_justify="left")  # fmt: skip
    table.add_column("")
    for name in ("count", "p50", "p99", "longest"):
        table.add_column(name, justify="right")

    def row(name: str, gaps: Gaps) -> None:
        numbers = (gaps.p50_ms, gaps.p99_ms, gaps.max_ms)
        cells = [f"{value:,.0f} ms" if gaps.count else "-" for value in numbers]
        table.add_row(name, str(gaps.count), *cells)

    found = report.moved.gaps
    row("no reconfiguration under way", found.steady)
    row("while layers move", found.moving)
    row("at a switchover", found.switchover)
    row("at a no-op switchover", found.noop)
    row("next to another request's prompt", found.prefill)
    row("unmoved run", report.unmoved.gaps.steady)
    return table

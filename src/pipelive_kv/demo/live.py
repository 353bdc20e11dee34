"""The demo on a terminal: stages, phases, lag, memory and the tokens as they flow."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from pipelive_kv.coordinator import Phase
from pipelive_kv.demo.recorder import Sample, Switchover
from pipelive_kv.demo.report import RestartReport
from pipelive_kv.demo.setup import Setup
from pipelive_kv.demo.view import View, outcome_line
from pipelive_kv.messages import Progress
from pipelive_kv.placement import Placement

STYLES = ("cyan", "dark_orange3", "green3", "medium_purple2", "red3", "grey62", "gold3", "white")
SPARKS = " ▁▂▃▄▅▆▇█"
LINES = 7
TEXT_TOKENS = 24
UNUSUAL_PHASES = (Phase.ABORTING, Phase.ABORTED, Phase.RECOVERING)
SHOWN_PHASES = tuple(p for p in Phase if p not in UNUSUAL_PHASES)


class LiveView(View):
    """Redraws a picture of the run about eight times a second.

    Args:
        console: a terminal.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._lock = threading.Lock()
        self._started = time.monotonic()
        self._setup: Setup | None = None
        self._title = "getting ready"
        self._processes: tuple[int, ...] = ()
        self._tokens: list[list[int]] = []
        self._times: deque[float] = deque(maxlen=400)
        self._stages: tuple[Progress, ...] = ()
        self._layers: tuple[tuple[int, ...], ...] = ()
        self._coming: tuple[tuple[int, ...], ...] = ()
        self._move = ""
        self._phase: Phase | None = None
        self._lags: deque[int] = deque(maxlen=40)
        self._lines: deque[str] = deque(maxlen=LINES)
        self._decode: Callable[[list[int]], str] = lambda tokens: " ".join(map(str, tokens))
        self._live = Live(
            console=console, get_renderable=self.picture, refresh_per_second=8, transient=True
        )
        self._live.start()

    # -- events ------------------------------------------------------------------------------------

    def say(self, text: str) -> None:
        """Add a line to the log."""
        with self._lock:
            self._lines.append(f"{time.monotonic() - self._started:6.1f} s  {text}")

    def on_setup(self, setup: Setup) -> None:
        """Show what is run."""
        with self._lock:
            self._setup = setup
            self._decode = setup.decode
            self._layers = setup.source.stages

    def on_run(self, title: str, processes: tuple[int, ...], requests: int) -> None:
        """Start over with empty requests."""
        with self._lock:
            self._title, self._processes = title, processes
            self._tokens = [[] for _ in range(requests)]
            self._times.clear()
            self._stages = ()
            if self._setup is not None:
                self._layers = self._setup.source.stages
        self.say(f"{title}: stage processes {', '.join(map(str, processes))}")

    def on_token(self, request: int, token: int) -> None:
        """Show it."""
        with self._lock:
            while len(self._tokens) <= request:
                self._tokens.append([])
            self._tokens[request].append(token)
            self._times.append(time.monotonic())

    def on_sample(self, sample: Sample) -> None:
        """Show memory and lag."""
        with self._lock:
            self._stages = sample.stages
            self._lags.append(max(stage.lag_steps for stage in sample.stages))

    def on_move(self, name: str, mode: str, old: Placement, new: Placement) -> None:
        """Show what moves where."""
        with self._lock:
            self._move = f"{name}: {old} to {new}" if old != new else f"{name}: nothing moves"
            self._layers, self._coming = old.stages, new.stages

    def on_phase(self, phase: Phase) -> None:
        """Show the phase."""
        with self._lock:
            self._phase = phase
            if phase is Phase.RELEASING:
                self._layers = self._coming

    def on_switchover(self, switch: Switchover) -> None:
        """Log what it was."""
        with self._lock:
            self._phase, self._layers = None, switch.report.new.stages
            self._coming = ()
        self.say(outcome_line(switch))

    def on_restart(self, report: RestartReport) -> None:
        """Log how long it took."""
        with self._lock:
            self._coming = ()
        self.say(
            f"restart: {report.requests} requests waited {report.stop_ms / 1e3:.1f} s, "
            f"{report.tokens_recomputed} tokens computed again"
        )

    def close(self) -> None:
        """Take the picture away."""
        self._live.stop()

    # -- picture -----------------------------------------------------------------------------------

    def picture(self) -> RenderableType:
        """What is shown at this moment."""
        with self._lock:
            parts: list[RenderableType] = [self._stage_table(), self._move_lines()]
            if self._tokens:
                parts.append(self._request_table())
            parts.append(Text("\n".join(self._lines), style="dim"))
            name = self._setup.name if self._setup is not None else "pipelive-kv demo"
            return Panel(
                Group(*parts),
                title=f"[bold]{name}[/bold]  {self._title}",
                subtitle=f"{time.monotonic() - self._started:.0f} s",
                border_style="grey50",
                padding=(0, 1),
            )

    def _stage_table(self) -> Table:
        table = Table.grid(padding=(0, 2), expand=False)
        for rank, layers in enumerate(self._layers):
            style = STYLES[rank % len(STYLES)]
            process = self._processes[rank] if rank < len(self._processes) else 0
            row: list[RenderableType] = [
                Text(f"stage {rank}", style=f"bold {style}"),
                Text(f"pid {process}" if process else "", style="dim"),
                self._layer_bar(rank),
                Text(f"{len(layers):2d} layers"),
            ]
            if rank < len(self._stages) and self._setup is not None:
                stage, budget = self._stages[rank], self._setup.budget_bytes
                row += [
                    ProgressBar(
                        total=budget, completed=stage.used_bytes, width=22, complete_style=style
                    ),
                    Text(f"{stage.used_bytes / 2**20:4.0f} of {budget / 2**20:.0f} MiB"),
                ]
            table.add_row(*row)
        return table

    def _layer_bar(self, rank: int) -> Text:
        """A cell per layer: full where it runs, half where it is on its way."""
        bar = Text()
        held = set(self._layers[rank])
        coming = set(self._coming[rank]) - held if self._coming else set()
        leaving = held - set(self._coming[rank]) if self._coming else set()
        style = STYLES[rank % len(STYLES)]
        for layer in range(sum(map(len, self._layers))):
            if layer in coming:
                bar.append("▒", style=style)
            elif layer in leaving:
                bar.append("▓", style=f"dim {style}")
            elif layer in held:
                bar.append("█", style=style)
            else:
                bar.append("·", style="grey37")
        return bar

    def _move_lines(self) -> Text:
        text = Text()
        text.append(self._move or "no move yet", style="bold" if self._phase else "dim")
        text.append("\n")
        for phase in SHOWN_PHASES:
            current = phase is self._phase
            text.append(f" {phase.value} ", style="bold reverse red" if current else "grey50")
            text.append(" " if phase is SHOWN_PHASES[-1] else ">", style="grey37")
        rounds = sum(stage.rounds for stage in self._stages)
        sent = sum(stage.bytes_sent for stage in self._stages) / 1e6
        lag = self._lags[-1] if self._lags else 0
        top = max([8, *self._lags])
        spark = "".join(SPARKS[value * (len(SPARKS) - 1) // top] for value in self._lags)
        text.append(
            f"\n{rounds:3d} rounds   {sent:6.1f} MB sent   lag {lag:3d} steps  {spark}\n",
            style="bold" if self._phase else "dim",
        )
        return text

    def _request_table(self) -> Table:
        recent = [at for at in self._times if at > time.monotonic() - 3.0]
        table = Table(
            box=None,
            padding=(0, 1),
            expand=True,
            title=f"{sum(map(len, self._tokens))} tokens, {len(recent) / 3.0:.1f} per second",
            title_justify="left",
            title_style="bold",
            show_header=False,
        )
        table.add_column(width=11, no_wrap=True)
        table.add_column(width=18)
        table.add_column(width=5, justify="right")
        table.add_column(ratio=1, no_wrap=True, overflow="ellipsis", style="grey70")
        total = self._setup.requests[0].max_new_tokens if self._setup is not None else 1
        for number, tokens in enumerate(self._tokens):
            text = " ".join(self._decode(tokens[-TEXT_TOKENS:]).split())
            table.add_row(
                f"request {number}",
                ProgressBar(total=total, completed=len(tokens), width=18),
                str(len(tokens)),
                text,
            )
        return table

"""What moving KV costs the tokens: TPOT lost per GB/s moved, under several rate caps.

The reference engine decodes while a thread of its first stage streams patches to a thread of its
last one, as a move does, under a cap that changes from window to window in random order. TPOT is
the mean gap between two tokens of a request; what is lost is compared with the pause of the same
repetition.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common import Figure, Result, Spread, Table, finish, number, parser
from engine_load import LoadedEngine, Script, engine_config, model_folder
from patch_stream import Remote
from pipelive_kv import Placement
from pipelive_kv.engines.reference import Engine
from pipelive_kv.engines.transformers import TransformersModel


@dataclass(frozen=True)
class Window:
    """A stretch of steps under one cap (bytes per second; None is no cap)."""

    repetition: int
    cap: float | None
    steps: tuple[int, int]
    rate: float
    """Bytes per second that really went over."""


def windows(
    load: LoadedEngine, remote: Remote, arguments: argparse.Namespace, found: list[Window]
) -> Script:
    """Every cap once per repetition, in random order, pauses included."""
    order = random.Random(arguments.seed)
    caps: list[float | None] = [0.0, *(mb * 1e6 for mb in arguments.caps), None]
    yield from load.wait_steps(2 * arguments.settle)
    for repetition in range(arguments.repetitions):
        order.shuffle(caps)
        for cap in caps:
            remote.cap(cap)
            yield from load.wait_steps(arguments.settle)
            first, sent, begin = max(load.steps), remote.cap(cap), time.monotonic()
            yield from load.wait_steps(arguments.steps)
            last, sent = max(load.steps), remote.cap(cap) - sent
            rate = sent / (time.monotonic() - begin)
            found.append(Window(repetition, cap, (first, last), rate))
    remote.cap(0.0)


def evaluate(load: LoadedEngine, found: list[Window]) -> Result:
    """Tables and figures."""
    result = Result("tpot_cost")
    gaps = load.gaps()
    tpot: dict[tuple[int, float | None], float] = {}
    for window in found:
        low, high = window.steps
        inside = [b.at - a.at for a, b in gaps if low <= a.seq and b.seq <= high]
        if inside:
            tpot[window.repetition, window.cap] = float(np.mean(inside))
    rows, points = [], []
    caps = sorted({window.cap for window in found}, key=lambda cap: np.inf if cap is None else cap)
    for cap in caps:
        own = [w for w in found if w.cap == cap and (w.repetition, cap) in tpot]
        own = [w for w in own if (w.repetition, 0.0) in tpot]
        values = Spread.of(tpot[w.repetition, cap] for w in own)
        lost = [tpot[w.repetition, cap] - tpot[w.repetition, 0.0] for w in own]
        share = Spread.of(loss / tpot[w.repetition, 0.0] for w, loss in zip(own, lost, strict=True))
        rate = Spread.of(w.rate for w in own)
        per = Spread.of(lost).p50 / (rate.p50 / 1e9) if rate.p50 else float("nan")
        if cap != 0:
            points += [(w.rate / 1e9, loss) for w, loss in zip(own, lost, strict=True)]
        rows.append([
            "none" if cap is None else "paused" if cap == 0 else f"{number(cap / 1e9)} GB/s",
            str(len(own)), number(rate.p50 / 1e9), number(values.p50 * 1e3),
            number(values.p90 * 1e3), number(values.p99 * 1e3),
            number(Spread.of(lost).p50 * 1e3), number(share.p50 * 100), number(per * 1e3),
        ])  # fmt: skip
    result.tables.append(Table(
        "TPOT while KV moves", ("cap", "windows", "moved, GB/s", "TPOT p50, ms", "p90", "p99",
                                "lost p50, ms", "lost, %", "lost per GB/s, ms"),
        rows, "The threads that pack and unpack compute on the same cores as the stages.",
    ))  # fmt: skip
    paused = Spread.of(value for (_, cap), value in tpot.items() if cap == 0)
    slope = _slope(points)
    apart = [_slope(points[i::4]) for i in range(4)]
    result.figures.append(Figure(
        "TPOT lost per GB/s moved", slope * 1e3, "ms per GB/s", "",
        f"TPOT {number(paused.p50 * 1e3)} ms without (p50); cores are shared with the stages",
        None, "quarters of the windows " + ", ".join(number(s * 1e3) for s in apart),
    ))  # fmt: skip
    result.figures.append(Figure(
        "the same as a share of TPOT", slope / paused.p50 * 100, "% per GB/s",
        spread=f"TPOT without p90 {number(paused.p90 * 1e3)} ms, n = {paused.count}",
    ))  # fmt: skip
    result.data = {"points": points, "paused": [v for (_, cap), v in tpot.items() if cap == 0]}
    return result


def _slope(points: list[tuple[float, float]]) -> float:
    """Least squares through the origin; a stream that moves nothing costs nothing."""
    if not points:
        return float("nan")
    x, y = np.array(points).T
    return float((x * y).sum() / (x * x).sum())


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--model", default="smollm2", help='"smollm2", "tiny" or a folder')
    made.add_argument("--caps", type=float, nargs="+", default=[100, 300, 600, 1000],
                      help="MB/s; a pause and no cap come in addition")  # fmt: skip
    made.add_argument("--repetitions", type=int, default=5)
    made.add_argument("--steps", type=int, default=24, help="of a window")
    made.add_argument("--settle", type=int, default=6, help="steps between windows")
    made.add_argument("--batch", type=int, default=4, help="requests per lane; there are two lanes")
    made.add_argument("--tokens", type=int, default=384, help="new tokens of each request")
    made.add_argument("--transport", default="auto", choices=("auto", "shm", "tcp"))
    arguments = made.parse_args()
    started = time.monotonic()
    remote, found = Remote(arguments.transport), []
    with tempfile.TemporaryDirectory(prefix="pipelive-bench-") as scratch:
        folder = model_folder(arguments.model, Path(scratch))
        layers = TransformersModel(folder, dtype="float32").num_layers
        config = engine_config(
            folder,
            Placement.from_counts([layers - layers // 2, layers // 2]),
            arguments.batch,
            max_tokens=arguments.tokens + 64,
            reconfigurable=False,
            wrap_hooks=remote.wrap_hooks,
        )
        with Engine(config) as engine:
            remote.connect()
            load = LoadedEngine(engine, new_tokens=arguments.tokens, seed=arguments.seed)
            load.play(windows(load, remote, arguments, found))
            remote.close()
    finish(evaluate(load, found), arguments, started)


if __name__ == "__main__":
    main()

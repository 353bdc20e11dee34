"""What a live move is compared with: stop-and-copy, and a restart with the new placement."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from dataclasses import dataclass

from pipelive_kv.demo.recorder import Recorder
from pipelive_kv.demo.report import RestartReport
from pipelive_kv.demo.scenario import Pace, Script, ScriptedRun
from pipelive_kv.demo.setup import Setup
from pipelive_kv.demo.view import View
from pipelive_kv.engines.reference import Engine, Request


class _StopHereError(Exception):
    """Leaves ``Engine.run`` with requests still running, as a restart does."""


@dataclass(frozen=True)
class Baselines:
    """What was measured, and the run in which the stop-and-copy was made."""

    recorder: Recorder
    restart: RestartReport


def stop_and_copy_then_restart(engine: Engine, setup: Setup, pace: Pace, view: View) -> Baselines:
    """Move layers with the engine held, then end its processes and start new ones.

    The requests are those that were there from the start, and both happen about where the live move
    happened in their text. The engine is closed afterwards.
    """
    run = ScriptedRun(engine, view)
    for request in setup.requests[:-1]:
        run.submit(request)

    def script() -> Script:
        yield from run.wait_tokens(pace.warm)
        yield from run.reconfigure("stop-and-copy", setup.target, mode="stop_and_copy")
        yield from run.wait_steps(pace.settle)
        raise _StopHereError

    with contextlib.suppress(_StopHereError):
        run.play(script())
    return Baselines(run.recorder, _restart(run, engine, setup, view))


def _restart(run: ScriptedRun, engine: Engine, setup: Setup, view: View) -> RestartReport:
    """From the last token before to each request's first one after, with all KV computed anew."""
    old, new = engine.placement, setup.source
    view.on_move("restart", "restart", old, new)
    tokens = {number: run.recorder.tokens_of(number) for number in run.recorder.requests}
    open_requests = [
        (number, request)
        for number, request in enumerate(run.submitted)
        if len(tokens[number]) < request.max_new_tokens
    ]
    engine.close()
    # A process that is started anew imports everything anew; a fork server would hide that.
    with Engine(dataclasses.replace(setup.config_with(new), start_method="spawn")) as fresh:
        ready = time.monotonic()
        again = ScriptedRun(fresh, view)
        lengths = 0
        for number, request in open_requests:
            prompt = request.prompt + tuple(token.token for token in tokens[number])
            lengths += len(prompt)
            again.submit(Request(prompt, 1, stop_at_eos=False))
        seen = again.play(None).recorder
    waits = [
        seen.tokens_of(index)[0].at - tokens[number][-1].at
        for index, (number, _) in enumerate(open_requests)
    ]
    last = max((tokens[number][-1].at for number, _ in open_requests), default=ready)
    report = RestartReport(
        old=old.counts,
        new=new.counts,
        stop_ms=1e3 * max(waits, default=0.0),
        relaunch_ms=1e3 * (ready - last),
        requests=len(open_requests),
        tokens_recomputed=lengths,
    )
    view.on_restart(report)
    return report

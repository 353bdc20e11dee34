import io

from rich.console import Console

from pipelive_kv.coordinator import Phase
from pipelive_kv.demo.live import LiveView
from pipelive_kv.demo.view import LineView
from tests.demo import synthetic
from tests.demo.test_outputs import findings  # noqa: F401


def play(view, found):
    view.on_setup(found.setup)
    view.on_run("moved run", (101, 102), 6)
    recorder = found.moved.recorder
    for token in recorder.tokens[:200]:
        view.on_token(token.request, token.token)
    view.on_sample(recorder.samples[0])
    view.on_move("move 1", "live", synthetic.OLD, synthetic.NEW)
    for phase in (Phase.ADMITTED, Phase.STAGING, Phase.PATCHING):
        view.on_phase(phase)
    view.on_sample(recorder.samples[10])


def test_live_view_shows_the_run(findings):  # noqa: F811
    stream = io.StringIO()
    console = Console(file=stream, width=130, height=40, force_terminal=True)
    view = LiveView(console)
    try:
        play(view, findings)
        with console.capture() as captured:
            console.print(view.picture())
        text = captured.get()
        for part in ("stage 0", "pid 101", "20 layers", "patching", "request 5", "MiB", "lag"):
            assert part in text
        assert "▒" in text  # layers on their way
        view.on_switchover(findings.moved.recorder.switchovers[1])
        view.on_restart(findings.baselines.restart)
    finally:
        view.close()


def test_line_view_prints_events(findings):  # noqa: F811
    stream = io.StringIO()
    view = LineView(stream, seconds=0.0)
    play(view, findings)
    view.on_switchover(findings.moved.recorder.switchovers[1])
    view.on_restart(findings.baselines.restart)
    view.close()
    text = stream.getvalue()
    assert "10/20" in text
    assert "tokens, " in text
    assert "restart: 5 requests waited 9.0 s" in text

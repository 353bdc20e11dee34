"""The three files, made from a run that never happened."""

import io
from types import SimpleNamespace

import msgspec
import pytest
from rich.console import Console

from pipelive_kv.demo.options import DemoOptions
from pipelive_kv.demo.report import DemoReport
from pipelive_kv.demo.run import Findings, report_of, to_json, write
from pipelive_kv.demo.summary import print_summary
from pipelive_kv.engines.reference import Request
from tests.demo import synthetic


@pytest.fixture
def findings():
    setup = SimpleNamespace(
        name="a model",
        source=synthetic.OLD,
        target=synthetic.NEW,
        requests=tuple(Request((1,) * 300, 64) for _ in range(synthetic.REQUESTS)),
        budget_bytes=520 << 20,
        decode=lambda tokens: " ".join(map(str, tokens)),
    )
    return Findings(
        DemoOptions(),
        setup,
        synthetic.moved(),
        synthetic.baselines(),
        synthetic.unmoved(),
        seconds=100.0,
    )


def test_report(findings):
    report = report_of(findings)
    assert report.ok
    assert report.verdict == "tokens identical: 6/6"
    assert [move.name for move in report.moves] == ["move 1", "move 2"]
    assert report.moves[0].layers_moved == tuple(range(10, 20))
    assert report.moves[0].arrivals == 1
    assert report.moves[0].stop_ms == pytest.approx(1.7)
    assert len(report.noops) == 3
    assert report.memory[0].process == 101
    assert report.memory[1].ok
    assert report.requests[5].arrived_in == "move 1, staging"
    assert report.restart.stop_ms > report.stop_and_copy.gap.max_ms > report.moves[0].gap.max_ms


def test_report_is_plain_json(findings):
    report = report_of(findings)
    content = msgspec.json.decode(to_json(report))
    assert content["ok"] is True
    assert content["moves"][0]["rounds"][0]["dirty_slots"] == 2400
    assert msgspec.convert(content, DemoReport) == report


def test_one_other_token_makes_it_fail(findings):
    token = findings.unmoved.recorder.tokens[-1]
    object.__setattr__(token, "token", token.token + 1)
    report = report_of(findings)
    assert not report.ok
    assert report.tokens_identical == 5
    [wrong] = [request for request in report.requests if not request.identical]
    assert wrong.request == token.request
    assert wrong.sha256_moved != wrong.sha256_unmoved
    assert wrong.first_difference == wrong.new_tokens - 1


def test_one_missing_token_makes_it_fail(findings):
    findings.moved.recorder.tokens.pop()
    assert report_of(findings).verdict == "tokens identical: 5/6"


def test_files(findings, tmp_path):
    report = report_of(findings)
    write(report, findings, tmp_path / "deep" / "out")
    assert msgspec.json.decode((tmp_path / "deep/out/report.json").read_bytes())["ok"]
    trace = msgspec.json.decode((tmp_path / "deep/out/trace.json").read_bytes())
    names = {event["name"] for event in trace["traceEvents"]}
    assert {"bulk copy", "round 1", "activate", "patching", "decode 50", "memory MiB"} <= names
    picture = (tmp_path / "deep/out/timeline.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert len(picture) > 50_000


def test_summary_says_the_verdict(findings):
    stream = io.StringIO()
    report = report_of(findings)
    print_summary(report, Console(file=stream, width=120), findings.options.out)
    text = stream.getvalue()
    assert "tokens identical: 6/6" in text
    assert "stop-and-copy" in text
    assert "restart" in text
    assert "in the middle of move 1" in text


def test_warns_where_the_run_did_not_show_what_it_should(findings):
    findings.moved.arrivals.clear()
    object.__setattr__(findings.moved.recorder.switchovers[1], "decoding", 2)
    warnings = report_of(findings).warnings
    assert any("only 2 of 6" in warning for warning in warnings)
    assert any("no request arrived" in warning for warning in warnings)

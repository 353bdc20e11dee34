import msgspec

from pipelive_kv.trace import Trace
from tests.demo import synthetic


def test_names_processes_and_tracks_once(tmp_path):
    trace = Trace(1_000)
    first = trace.track("stage 0", "steps")
    assert trace.track("stage 0", "steps") == first
    other = trace.track("stage 0", "gates")
    assert other.process == first.process
    assert other.thread != first.thread
    assert trace.process("driver", pid=first.process) != first.process
    trace.span(first, "step", 2_000, 5_000, seq=7)
    trace.instant(first, "now", 3_000)
    trace.counter("stage 0", "memory", 4_000, {"used": 1.5})
    trace.write(tmp_path / "trace.json")
    events = msgspec.json.decode((tmp_path / "trace.json").read_bytes())["traceEvents"]
    assert len(events) == len(trace)
    [span] = [event for event in events if event["ph"] == "X"]
    assert (span["ts"], span["dur"], span["args"]) == (1.0, 3.0, {"seq": 7})
    assert sum(event["name"] == "process_name" for event in events) == 2
    [counter] = [event for event in events if event["ph"] == "C"]
    assert counter["args"] == {"used": 1.5}


def test_report_becomes_phases_rounds_and_gates():
    switch = synthetic.moved().recorder.switchovers[1]
    trace = Trace(0)
    trace.add_report(switch.report)
    events = msgspec.json.decode(trace.to_bytes())["traceEvents"]
    spans = [event for event in events if event["ph"] == "X"]
    assert [e["name"] for e in spans if "reconfiguration" in e["args"]] == [
        phase.phase.value for phase in switch.report.phases
    ]
    assert sum(event["name"].startswith("round ") for event in spans) == 10
    assert sum(event["name"] == "gate" for event in spans) == 1
    assert all(event["dur"] >= 0 for event in spans)

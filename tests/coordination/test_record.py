import multiprocessing

import pytest

from pipelive_kv.errors import CorruptError, InvalidArgumentError
from pipelive_kv.record import Decision, FileDecisionRecord


def test_first_decision_holds(tmp_path):
    record = FileDecisionRecord(tmp_path / "record")
    assert record.read(3) is None
    assert record.newest_epoch() == -1
    commit = Decision(3, "commit", step=17, stages=((0,), (1,)))
    assert record.decide(commit) == commit
    assert record.decide(Decision(3, "abort", reason="late")) == commit
    assert FileDecisionRecord(tmp_path / "record").read(3) == commit
    assert record.newest_epoch() == 3
    assert [path.name for path in record.directory.iterdir()] == ["epoch-00000003.json"]


def _race(directory, outcome, barrier, results):
    record = FileDecisionRecord(directory)
    barrier.wait(timeout=60)
    results.put(record.decide(Decision(1, outcome, step=5)).outcome)


def test_processes_agree_whoever_is_first(tmp_path):
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(4), context.Queue()
    racers = [
        context.Process(target=_race, args=(tmp_path, outcome, barrier, results))
        for outcome in ("commit", "abort", "commit", "abort")
    ]
    for racer in racers:
        racer.start()
    outcomes = {results.get(timeout=60) for _ in racers}
    for racer in racers:
        racer.join(timeout=60)
    assert len(outcomes) == 1
    assert FileDecisionRecord(tmp_path).read(1).outcome in outcomes


def test_refuses_bad_decisions_and_broken_files(tmp_path):
    record = FileDecisionRecord(tmp_path)
    with pytest.raises(InvalidArgumentError, match="epoch is -1"):
        record.decide(Decision(-1, "abort"))
    with pytest.raises(InvalidArgumentError, match="step is -1"):
        record.decide(Decision(1, "commit"))
    (tmp_path / "epoch-00000002.json").write_text('{"epoch": 2, "outcome": "maybe"}')
    with pytest.raises(CorruptError, match="epoch-00000002"):
        record.read(2)
    with pytest.raises(CorruptError):
        record.decide(Decision(2, "abort"))
    (tmp_path / "epoch-00000004.json").write_text('{"epoch": 5, "outcome": "abort"}')
    with pytest.raises(CorruptError, match="epoch 5, expected 4"):
        record.read(4)

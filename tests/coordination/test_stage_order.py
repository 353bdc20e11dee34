"""Stamps and messages that come to a stage in another order than they should."""

import pytest
from simulation import StageWorker

import pipelive_kv as pk
from pipelive_kv.messages import Abort, Arm, Connect, LoadWeights, Prepare, StartCopy, WriteThrough
from pipelive_kv.stage.service import StageService

EPOCH, TIMEOUT = 1, 20.0
BEFORE, AFTER = pk.Placement.from_counts([2, 1]), pk.Placement.from_counts([1, 2])


@pytest.fixture
def worker():
    made = StageWorker(1, 2, BEFORE, None, capacity=8, max_blocks=8, budget="1MiB", transport="tcp")
    made.thread.start()
    yield made
    made.close()


@pytest.mark.parametrize("loads", [True, False])
def test_no_vote_before_the_weights_are_loaded(worker, loads):
    service = StageService(worker.stage, bytes(32))
    service.handle(Prepare(EPOCH, AFTER.stages, ((0, (1,)),), "source", False, TIMEOUT))
    service.handle(Connect(EPOCH, AFTER.stages, (), "source", False, 0.0, TIMEOUT))
    service.handle(StartCopy(EPOCH, (), 5.0, 8, TIMEOUT))
    if loads:
        service.handle(LoadWeights(EPOCH, TIMEOUT))
    service.handle(WriteThrough(EPOCH, TIMEOUT))
    state = worker.stage.state
    if loads:
        service.handle(Arm(EPOCH, TIMEOUT))
        assert worker.stage.state is not state
    else:
        said = r"stage 1 has not loaded the weights of layers \(1,\)"
        with pytest.raises(pk.BusyError, match=said):
            service.handle(Arm(EPOCH, TIMEOUT))
        assert worker.stage.state is state
    service.handle(Abort(EPOCH, "the end of the test", TIMEOUT))
    assert worker.pool.layers == (2,)


def run(stage, stamp):
    stage.end(stage.begin(stamp))


def test_steps_run_in_the_order_of_their_numbers(worker):
    stage = worker.stage
    stamps = [pk.Stamp(seq, 0, 8) for seq in range(4)]
    run(stage, stamps[0])
    for wrong in (stamps[0], stamps[2], stamps[3]):
        with pytest.raises(pk.ProtocolError, match=f"got step {wrong.seq}, expected 1"):
            stage.begin(wrong)
    held = stage.begin(stamps[1])
    with pytest.raises(pk.ProtocolError, match="step 2 begins before step 1 ended"):
        stage.begin(stamps[2])
    stage.end(held)
    with pytest.raises(pk.ProtocolError, match="step 1 is not the one that was begun last"):
        stage.end(held)
    run(stage, stamps[2])
    assert stage.last_seq == 2

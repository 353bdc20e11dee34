"""The coordinator's process is killed at every point; a new one ends what it left."""

import gc
import os
import shutil
import tempfile
import threading
from pathlib import Path

import pytest
from coordinator_process import CoordinatorProcess
from simulation import Pipeline

import pipelive_kv as pk

OLD, NEW = [4, 2, 0], [1, 4, 1]
# 40 blocks of 512 bytes are 5 pages a layer; stage 1 holds 5 layers for a while: it has to shrink.
BUDGET = 4 * 5 * 4096

BEFORE = [
    ("Describe", 1),
    ("Admit", 0),
    ("Shrink", 0),
    ("AwaitResize", 0),
    ("Prepare", 0),
    ("Prepare", 1),
    ("Connect", 2),
    ("StartCopy", 1),
    ("LoadWeights", 0),
    ("AwaitConverged", 0),
    ("Arm", 0),
    ("Arm", 2),
    ("Propose", 0),
    ("decide", 0),
]
AFTER = [
    ("decide", 1),
    ("Settle(commit)", 0),
    ("Commit", 0),
    ("Commit", 1),
    ("AwaitSwitched", 0),
    ("Release", 0),
    ("Release", 2),
    ("Grow", 1),
    ("RaiseCapacity", 0),
]
ABORTING = [("Abort", 0), ("Abort", 2), ("Settle(abort)", 0), ("Grow", 1), ("RaiseCapacity", 0)]


@pytest.fixture
def place(tmp_path):
    """Give a folder whose name is short enough for a socket's address."""
    folder = Path(tempfile.mkdtemp(prefix="pk-", dir="/tmp"))
    yield folder
    shutil.rmtree(folder)


class Scene:
    """A pipeline whose coordinator lives elsewhere."""

    def __init__(self, place):
        key = pk.ControlKey.generate()
        key.save(place / "key")
        self.place = place
        self.endpoint = pk.ControlEndpoint(f"ipc://{place}/control", key)
        self.pipeline = Pipeline(
            OLD, place / "record", endpoint=self.endpoint, budget=BUDGET, seed=os.getpid()
        )
        self.coordinator = None
        self.run(20)

    def run(self, steps):
        """Steps whose sequences never hold more than half of the blocks."""
        for _ in range(steps):
            self.pipeline.step()
            self.pipeline.drain()
            while len(self.pipeline.allocator.live()) > 20:
                self.pipeline.scheduler.freed(self.pipeline.sequences.pop(0).blocks)

    def kill_at(self, point, cancel_in=""):
        child = CoordinatorProcess(
            self.endpoint.address, self.place / "key", self.place / "record", NEW, point, cancel_in
        )
        while not child.over.is_set():
            if self.waits_at_k:
                child.over.wait(timeout=0.01)
            else:
                self.run(1)
        assert child.over.wait(timeout=120)
        assert child.said[-1] == "reached", child.said
        child.kill()

    @property
    def waits_at_k(self):
        """A step would wait for a word of the coordinator, which is stopped at its point."""
        switch = self.pipeline.scheduler._state.switch
        undecided = self.pipeline.scheduler._state.protocol.value == "proposed"
        return undecided and switch is not None and self.pipeline.scheduler.next_seq >= switch.step

    def recover(self):
        """A new coordinator, while steps go on."""
        self.coordinator = pk.Coordinator(
            self.endpoint, pp_size=len(OLD), record_dir=self.place / "record"
        )
        found = []

        def work():
            try:
                found.append(self.coordinator.recover(timeout=120))
            except pk.PipeliveError as error:
                found.append(error)

        thread = threading.Thread(target=work)
        thread.start()
        while thread.is_alive():
            self.run(1)
        thread.join()
        if isinstance(found[0], Exception):
            raise found[0]
        return found[0]

    def check(self, counts):
        self.pipeline.check(pk.Placement.from_counts(counts))
        self.pipeline.read_all()

    def resources(self):
        gc.collect()  # pools of tests before this one
        used = [worker.pool.page_pool.stats().used_bytes for worker in self.pipeline.workers]
        shared = [
            link
            for link in map(_link, Path("/proc/self/fd").iterdir())
            if link.startswith(("/memfd", "/dev/shm"))
        ]
        sessions = (
            "pipelive-patch",
            "pipelive-apply",
            "pipelive-background",
            "pipelive-reconfigure",
        )
        threads = [t.name for t in threading.enumerate() if t.name.startswith(sessions)]
        return used, sorted(shared), threads, self.pipeline.allocator.capacity

    def reconfigure(self, counts):
        job = self.coordinator.reconfigure(
            pk.Placement.from_counts(counts),
            timeout=60,
            options=pk.MigrationOptions(max_stop_ms=100),
        )
        while not job.phase.is_final:
            self.run(1)
        job.wait(timeout=1)

    def close(self):
        if self.coordinator is not None:
            self.coordinator.close()
        self.pipeline.close()


def _link(path):
    try:
        return os.readlink(path)
    except FileNotFoundError:
        return ""


@pytest.fixture
def scene(place):
    made = Scene(place)
    yield made
    made.close()


def _names(points):
    return [f"{event}-{count}" for event, count in points]


@pytest.mark.parametrize("point", BEFORE, ids=_names(BEFORE))
def test_before_the_decision_all_is_taken_back(scene, point):
    before = scene.resources()
    scene.kill_at(point)
    scene.run(5)  # the old placement serves, also without any coordinator
    assert scene.pipeline.scheduler.placement == pk.Placement.from_counts(OLD)
    left = scene.recover()
    assert all(decision.outcome == "abort" for decision in left)
    scene.check(OLD)
    assert scene.resources() == before
    scene.reconfigure(NEW)
    scene.check(NEW)


@pytest.mark.parametrize("point", AFTER, ids=_names(AFTER))
def test_after_the_decision_it_is_completed(scene, point):
    before = scene.resources()
    scene.kill_at(point)
    left = scene.recover()
    assert [(decision.epoch, decision.outcome) for decision in left] == [(1, "commit")]
    scene.check(NEW)
    assert scene.pipeline.allocator.capacity == left[0].capacity
    scene.reconfigure(OLD)
    scene.check(OLD)
    assert scene.resources() == before


@pytest.mark.parametrize("point", ABORTING, ids=_names(ABORTING))
def test_while_it_takes_something_back(scene, point):
    before = scene.resources()
    scene.kill_at(point, cancel_in="armed")
    left = scene.recover()
    assert [(decision.epoch, decision.outcome) for decision in left] == [(1, "abort")]
    scene.check(OLD)
    assert scene.resources() == before


def test_a_new_coordinator_recovers_by_itself_before_it_reconfigures(scene):
    scene.kill_at(("Arm", 1))
    scene.coordinator = pk.Coordinator(
        scene.endpoint, pp_size=len(OLD), record_dir=scene.place / "record"
    )
    scene.reconfigure(NEW)
    scene.check(NEW)
    assert scene.coordinator.recover() == ()

"""The budget holds at every moment of a move: as the pools count, and as the system does."""

import os
import re
import threading

import numpy as np
import pytest
from simulation import Pipeline

import pipelive_kv as pk
from pipelive_kv.weights import TensorSpec

MIB = 1 << 20
PAGE = 64 << 10
WEIGHTS = 4 * MIB
"""Of one layer."""
BLOCKS = 8192
"""Half a KiB each, so that one layer's KV with all of them takes as much as its weights."""
LAYERS = 8
BUDGET = 4 * (WEIGHTS + 4 * MIB)
"""Exactly what four layers with all blocks take."""

CODE = 10 * MIB
"""What the process may grow by beside the budgets: threads, staging of the transports, records of
rounds, and what Python allocates. Less than the weights of the three layers that a move brings."""


class Weights:
    """Weights that are known by their layer."""

    def layout(self, layer):
        return (TensorSpec("w", "float32", (WEIGHTS // 4,)),)

    def load(self, layer, into):
        into["w"].data_bytes[:] = layer + 1


def pool_files():
    """Bytes of physical memory behind each device of this process, by the file's inode."""
    found = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            if os.readlink(f"/proc/self/fd/{name}").startswith("/memfd:pipelive_kv"):
                status = os.fstat(int(name))
                found[status.st_ino] = status.st_blocks * 512
        except OSError:
            continue
    return found


def resident():
    """Resident bytes of the process: those of device memory, and all."""
    devices = total = 0
    inside = False
    with open("/proc/self/smaps") as file:
        for line in file:
            if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
                inside = "/memfd:pipelive_kv" in line
            elif line.startswith("Rss:"):
                size = int(line.split()[1]) << 10
                total += size
                devices += size if inside else 0
    return devices, total


class Sampler:
    """Looks again and again in a thread of its own, and when it is told to."""

    def __init__(self, pools):
        self._pools = pools
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self.samples = 0
        self.most_in_a_file = self.most_held = self.most_mapped = self.most_beside = 0
        self._known = set(pool_files())
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self):
        while not self._stop.is_set():
            self.look()

    def look(self):
        with self._lock:
            self.samples += 1
            self.most_in_a_file = max(self.most_in_a_file, *pool_files().values())
            devices, total = resident()
            self.most_mapped = max(self.most_mapped, devices)
            self.most_beside = max(self.most_beside, total - devices)
            held = max(pool.stats().held_bytes for pool in self._pools)
            self.most_held = max(self.most_held, held)

    def stop(self):
        self._stop.set()
        self._thread.join()


@pytest.fixture
def pipeline(tmp_path):
    made = Pipeline(
        [4, 4],
        tmp_path / "record",
        capacity=BLOCKS,
        max_blocks=BLOCKS,
        budget=BUDGET,
        page_bytes=PAGE,
        weights=Weights(),
        transport="tcp",
        seed=5,
    )
    for worker in made.workers:
        for layer in worker.pool.layers:
            np.from_dlpack(worker.pool.layer(layer))[1:] = 7  # nothing is only promised
    yield made
    made.close()


def test_never_above_the_budget(pipeline):
    p = pipeline
    before = pool_files()
    assert sorted(before.values())[-2:] == [BUDGET, BUDGET]
    created = [worker.pool.page_pool.stats().pages_created for worker in p.workers]
    p.run(5)
    beside = resident()[1] - resident()[0]
    sampler = Sampler([worker.pool.page_pool for worker in p.workers])
    reports = []
    try:
        for counts in ([1, 7], [7, 1], [4, 4]):
            target = pk.Placement.from_counts(counts)
            job = p.coordinator.reconfigure(
                target,
                timeout=60,
                options=pk.MigrationOptions(max_stop_ms=1000),
                # However few looks a busy machine leaves the thread: one in every phase.
                on_phase=lambda _: sampler.look(),
            )
            p.run_until(job)
            reports.append(job.wait(timeout=1))
            p.check(target)
            for worker in p.workers:
                for layer in worker.weights.layers:
                    assert worker.weights.tensors(layer)["w"].data_bytes[0] == layer + 1
    finally:
        sampler.stop()
    assert sampler.samples > 10
    assert reports[0].capacity_during < BLOCKS / 2  # seven layers where there was room for four
    assert sampler.most_held <= BUDGET
    assert sampler.most_in_a_file <= BUDGET
    assert sampler.most_mapped <= 2 * BUDGET
    print("beside the budgets:", (sampler.most_beside - beside) // 1024, "KiB")
    assert sampler.most_beside - beside <= CODE
    for worker, count in zip(p.workers, created, strict=True):
        stats = worker.pool.page_pool.stats()
        assert stats.peak_held_bytes <= BUDGET
        # Weights came into pages that the shrink had set free: none was created for them.
        assert stats.pages_created == count
        assert stats.pages_reused > 0

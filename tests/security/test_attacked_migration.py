"""A reconfiguration goes on while strangers knock at its ports, open on this host alone."""

from __future__ import annotations

import ipaddress
import os
import stat

import pytest
from ports import Scanner, abstract_listeners, bound_udp, listening
from simulation import Pipeline
from stage_process import StageProcess

import pipelive_kv as pk

SECONDS = 120


def is_loopback(where):
    return ipaddress.ip_address(where[0]).is_loopback


@pytest.mark.parametrize("transport", ["tcp", "shm"])
def test_a_port_scan_does_no_harm(tmp_path, transport):
    seed = os.getpid()
    print("seed", seed)
    pipeline = Pipeline([4, 2], tmp_path / "record", seed=seed, transport=transport)
    try:
        pipeline.run(20)
        with Scanner(seed) as scanner:
            # There and back until the listeners of patches, which live for a moment, were found.
            counts = [[2, 4], [4, 2]]
            for turn in range(12):
                job = pipeline.coordinator.reconfigure(
                    pk.Placement.from_counts(counts[turn % 2]), timeout=SECONDS
                )
                pipeline.run_until(job)
                job.wait(timeout=SECONDS)
                assert job.phase is pk.Phase.DONE
                found = scanner.names if transport == "shm" else scanner.ports
                if turn % 2 and len(found) > (0 if transport == "shm" else 1):
                    break
            assert scanner.connections > 0
        assert len(found) > (0 if transport == "shm" else 1), "no patch listener was scanned"
        pipeline.check(pk.Placement.from_counts([4, 2]))
        pipeline.read_all()
    finally:
        pipeline.close()


def test_every_process_listens_on_loopback_alone(tmp_path):
    """Coordinator, scheduler and stages, before, while and after layers move between processes."""
    pipeline = Pipeline([3, 3, 0], tmp_path / "record", remote=1, transport="auto")
    key_file = tmp_path / "key"
    pipeline.coordinator.endpoint.key.save(key_file)
    assert stat.S_IMODE(key_file.stat().st_mode) == 0o600
    child = StageProcess(2, [3, 3, 0], pipeline.coordinator.endpoint, key_file)
    processes = ("self", child.process.pid)
    seen = {"tcp": 0, "unix": 0}

    def look():
        for pid in processes:
            where = listening(pid)
            assert all(map(is_loopback, where)), where
            assert not bound_udp(pid)
            seen["tcp"] = max(seen["tcp"], len(where))
            names = abstract_listeners(pid)
            assert all(name.startswith("@pipelive-") for name in names)
            seen["unix"] = max(seen["unix"], len(names))

    try:
        pipeline.coordinator.await_ready(SECONDS)
        look()
        pipeline.run(10)
        job = pipeline.coordinator.reconfigure(
            pk.Placement.from_counts([2, 2, 2]), timeout=SECONDS, on_phase=lambda _phase: look()
        )
        # The remote stage takes part in no step, so the job is called off once patches flow.
        while job.phase not in (pk.Phase.PATCHING, pk.Phase.ARMED) and not job.phase.is_final:
            pipeline.step()
            look()
        job.cancel()
        while not job.phase.is_final:
            pipeline.step()
        pipeline.drain()
        assert job.phase is pk.Phase.ABORTED
        look()
        assert seen["tcp"] >= 1
        assert seen["unix"] >= 1, "no patch listener was seen"
    finally:
        child.close()
        pipeline.close()

"""Stage processes come to a serving engine and leave it, and nobody can tell from the tokens."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from pipelive_kv.coordinator import MigrationOptions
from pipelive_kv.engines.reference import Engine, EngineConfig, EngineFailedError, Request
from pipelive_kv.engines.reference.processes import StageProcesses
from pipelive_kv.errors import BusyError
from pipelive_kv.placement import Placement

REQUESTS = [
    Request(
        tuple((7 * i + k * k) % 150 + 3 for k in range(10 + 9 * i)),
        40,
        temperature=float(i % 2),
        seed=i,
        stop_at_eos=False,
    )
    for i in range(4)
]


def config(path, **settings) -> EngineConfig:
    given = {"block_size": 8, "chunk": 16, "page_bytes": 64 << 10, "max_blocks": 128, **settings}
    return EngineConfig(path, Placement.from_counts([3, 3]), **given)


class Load:
    """Runs the engine in its own thread and hands the same requests in again and again."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.stopping = threading.Event()
        self.rounds: list[list[int]] = []
        self.error: BaseException | None = None
        self.results = {}
        self.thread = threading.Thread(target=self._run)
        self.thread.start()

    def _until(self) -> bool:
        if self.stopping.is_set():
            return True
        self.rounds.append([self.engine.submit(request) for request in REQUESTS])
        return False

    def _run(self) -> None:
        try:
            self.results = self.engine.run(until=self._until)
        except BaseException as error:
            self.error = error

    def stop(self) -> list[list[list[int]]]:
        """The tokens of all rounds."""
        self.stopping.set()
        self.thread.join(timeout=120)
        if self.error is not None:
            raise self.error
        return [[self.results[number].tokens for number in ids] for ids in self.rounds]


def move(engine: Engine, counts) -> None:
    engine.reconfigure(
        Placement.from_counts(counts), timeout=60, options=MigrationOptions(max_stop_ms=1000)
    ).wait(90)


@pytest.fixture(scope="module")
def expected(tiny):
    with Engine(config(tiny("qwen3"), reconfigurable=False)) as engine:
        ids = [engine.submit(request) for request in REQUESTS]
        results = engine.run()
        return [results[number].tokens for number in ids]


def test_scale_out_maintenance_and_scale_in(tiny, expected):
    with Engine(config(tiny("qwen3"))) as engine:
        load = Load(engine)
        try:
            assert engine.add_stage() == 2
            move(engine, [2, 2, 2])
            # The first one is taken out, started anew and taken in again.
            move(engine, [0, 3, 3])
            first = engine.pids[0]
            engine.remove_stage(0)
            assert engine.stages == (1, 2)
            assert first not in engine.pids
            assert engine.add_stage(0) == 0
            move(engine, [2, 2, 2])
            # And back to two, without the last one.
            move(engine, [3, 3, 0])
            with pytest.raises(BusyError, match="holds layers"):
                engine.remove_stage(1)
            engine.remove_stage(2)
            move(engine, [4, 2])
            assert len(engine.pids) == 2
        finally:
            rounds = load.stop()
    assert len(rounds) > 1
    for tokens in rounds:
        assert tokens == expected


def test_one_that_dies_before_it_holds_a_layer_is_not_missed(tiny, expected):
    with Engine(config(tiny("qwen3"))) as engine:
        load = Load(engine)
        try:
            rank = engine.add_stage()
            os.kill(engine.pids[rank], signal.SIGKILL)
            with pytest.raises(Exception, match=f"stage/{rank}|stage {rank}"):
                engine.reconfigure(Placement.from_counts([2, 2, 2]), timeout=5).wait(60)
            engine.remove_stage(rank)
            assert engine.add_stage() == rank
            move(engine, [2, 2, 2])
        finally:
            rounds = load.stop()
    for tokens in rounds:
        assert tokens == expected


def test_who_sends_to_a_stage_that_has_died_does_not_keep_its_end_from_being_noticed(
    tiny, expected, monkeypatch
):
    refused, noticed, go_on = (threading.Event() for _ in range(3))
    try_send, ended = StageProcesses._try_send, StageProcesses._ended

    def noting(processes, encoded, rank):
        sent = try_send(processes, encoded, rank)
        if not sent:
            refused.set()
        return sent

    def late(processes, rank, decoder):
        noticed.set()
        assert go_on.wait(60)
        return ended(processes, rank, decoder)

    with Engine(config(tiny("qwen3"))) as engine:
        load = Load(engine)
        try:
            rank = engine.add_stage()
            monkeypatch.setattr(StageProcesses, "_try_send", noting)
            monkeypatch.setattr(StageProcesses, "_ended", late)
            stages = engine._running()
            os.kill(engine.pids[rank], signal.SIGKILL)
            assert noticed.wait(60)

            def send():
                while not refused.is_set():
                    stages._send(b"", [rank])

            sending = threading.Thread(target=send)
            sending.start()
            assert refused.wait(60)
            go_on.set()
            sending.join(60)
            assert not sending.is_alive()
            engine.remove_stage(rank)
            move(engine, [4, 2])
        finally:
            go_on.set()
            rounds = load.stop()
    for tokens in rounds:
        assert tokens == expected


def die(hooks, pool):
    raise RuntimeError("dies on purpose")


def test_one_that_cannot_start_changes_nothing(tiny, expected):
    with Engine(config(tiny("qwen3"))) as engine:
        object.__setattr__(engine._launch, "config", config(tiny("qwen3"), wrap_hooks=die))
        load = Load(engine)
        try:
            with pytest.raises(EngineFailedError, match="stage 2 has gone: RuntimeError: dies"):
                engine.add_stage()
            assert engine.stages == engine.coordinator.stages == (0, 1)
            move(engine, [4, 2])
        finally:
            rounds = load.stop()
    for tokens in rounds:
        assert tokens == expected

"""The numbers of reconfigurations, and the waits for their outcomes; no engine is started here."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import pytest

import pipelive_kv.engines.vllm as live
from pipelive_kv import DeadlineError, InvalidArgumentError, PipeliveError, Placement
from pipelive_kv.coordinator import Job, Report
from pipelive_kv.engines.vllm import api
from pipelive_kv.engines.vllm.jobs import KEPT, Jobs
from pipelive_kv.protocol import Course, Phase

pytestmark = pytest.mark.timeout(60)


def job(to: tuple[int, ...] = (2, 4)) -> Job:
    found = Job(60.0)
    found.begin(Report(1, Placement.from_counts([3, 3]), Placement.from_counts(to), ()))
    return found


def failed(text: str) -> Job:
    found = job()
    found.fail(PipeliveError(text))
    found.enter(Phase.ABORTED)
    return found


class Engine:
    """An ``AsyncLLM`` as far as the calls go; ``polled`` is told each number asked for."""

    def __init__(self, polled=lambda number: None):
        self.jobs, self.begun, self._polled = Jobs(), job(), polled
        self.engine_core = self
        self.called: list[str] = []
        self.live = 1

    async def call_utility_async(self, method, *args):
        self.called.append(method)
        if method == "pipelive_reconfigure":
            return {"job": self.jobs.describe(self.jobs.add(self.begun))}
        if method == "pipelive_count":
            blocks = {"capacity": 8, "live": self.live}
            return {"layers": [3, 3], "blocks": blocks, "ended": self.jobs.count()}
        assert method in ("pipelive_status", "pipelive_job")
        self._polled(args[0])
        return {"layers": [3, 3], "job": self.jobs.describe(args[0])}


def test_each_has_a_number_and_the_last_few_are_kept():
    jobs = Jobs()
    assert jobs.describe() is None
    with pytest.raises(InvalidArgumentError, match="job is 1, expected none"):
        jobs.describe(1)
    for number in range(1, KEPT + 3):
        assert jobs.add(failed(f"no {number}")) == number
    assert jobs.describe()["number"] == KEPT + 2
    for number in range(3, KEPT + 3):
        assert jobs.describe(number)["error"]["message"] == f"no {number}"
    for number in (0, 2, KEPT + 3):
        with pytest.raises(InvalidArgumentError, match=f"job is {number}, expected 3 to"):
            jobs.describe(number)


def test_one_that_is_over_in_no_final_phase_is_over():
    jobs, lost = Jobs(), job()
    jobs.add(lost)
    assert jobs.is_under_way
    assert not jobs.describe()["final"]
    lost.fail(PipeliveError("the record cannot be written"))
    lost.end()
    found = jobs.describe()
    assert (found["phase"], found["final"]) == ("planned", True)
    assert found["error"]["message"] == "the record cannot be written"
    assert not jobs.is_under_way


def test_one_that_has_not_been_planned_yet_shows_no_error():
    jobs = Jobs()
    jobs.add(Job(60.0))
    assert jobs.describe() == {
        "number": 1,
        "phase": "planned",
        "final": False,
        "error": None,
        "lease": None,
    }


def test_a_cancel_lets_a_lease_go():
    jobs, done = Jobs(), job()
    jobs.add(done)
    done.lease = Job(60.0)
    done.end()
    assert jobs.describe()["lease"] == {"phase": "planned", "final": False}
    jobs.cancel()
    assert done.lease.cancelled
    done.lease.end()
    assert jobs.describe()["lease"]["final"]


def test_a_caller_gets_the_outcome_of_its_own_reconfiguration():
    def next_one(number: int) -> None:
        if len(asked) == 1:
            engine.begun.fail(PipeliveError("mine"))
            engine.begun.enter(Phase.ABORTED)
            engine.jobs.add(failed("another's"))
        asked.append(number)

    asked: list[int] = []
    engine = Engine(next_one)
    with pytest.raises(PipeliveError, match="mine"):
        asyncio.run(live.reconfigure_async(engine, [2, 4]))
    assert set(asked) == {1}
    # Asked for often on the engine's thread: not with the state of every block.
    assert engine.called[1:3] == ["pipelive_job"] * 2


def test_no_wait_is_for_ever(monkeypatch):
    monkeypatch.setattr(api, "_GRACE_S", 0.05)
    engine = Engine()
    with pytest.raises(DeadlineError, match=r"reconfiguration 1 has no outcome .* phase planned"):
        asyncio.run(live.reconfigure_async(engine, [2, 4], timeout=0.01))
    core = SimpleNamespace(call_utility=lambda *call: asyncio.run(engine.call_utility_async(*call)))
    llm = SimpleNamespace(llm_engine=SimpleNamespace(engine_core=core))
    with pytest.raises(DeadlineError, match="reconfiguration 2 has no outcome"):
        live.reconfigure(llm, [2, 4], timeout=0.01)


async def post(engine, timeout):
    """(body, HTTP status) of a request to move."""
    from pipelive_kv.engines.vllm.routes import PipeliveEndpoints

    async def body():
        return b'{"layers": [2, 4], "timeout": %g}' % timeout

    routes = PipeliveEndpoints()
    routes._engine = engine
    return await routes._answer(SimpleNamespace(body=body), routes._reconfigure)


def test_the_server_s_wait_ends_too(monkeypatch):
    monkeypatch.setattr(api, "_GRACE_S", 0.05)
    engine = Engine()
    found, code = asyncio.run(post(engine, 0.01))
    assert code == 504
    assert found["type"] == "DeadlineError"


@pytest.mark.parametrize(
    ("phase", "step", "code"),
    [
        (Phase.ABORTED, -1, 422),
        (Phase.ABORTED, 7, 500),  # a wave of several was carried out
        (Phase.ADMITTED, -1, 500),  # the record could not be written
        (Phase.DONE, 7, 500),
    ],
)
def test_only_a_move_that_was_given_up_is_told_as_one(phase, step, code):
    def fail(number):
        engine.begun.report.step = step
        engine.begun.fail(PipeliveError("why"))
        engine.begun.course = Course(phase)
        engine.begun.end()

    engine = Engine(fail)
    found, answered = asyncio.run(post(engine, 60))
    assert answered == code
    assert found["error"] == "PipeliveError: why"
    assert found["layers"] == [3, 3]


def test_a_move_that_could_not_be_planned_is_told_as_given_up():
    def fail(number):
        engine.begun.fail(PipeliveError("why"))
        engine.begun.enter(Phase.ABORTED)

    engine = Engine(fail)
    engine.begun = Job(60.0)
    assert asyncio.run(post(engine, 60))[1] == 422


def test_metrics_know_moves_that_others_began_and_blocks_between_moves(monkeypatch):
    from prometheus_client import REGISTRY

    from pipelive_kv.engines.vllm import routes

    def value(name, **labels):
        return REGISTRY.get_sample_value(f"pipelive_{name}", labels)

    def counted():
        return [
            value("reconfigurations_total", outcome=outcome)
            for outcome in ("done", "failed", "dry_run")
        ]

    def ended(*, dry_run):
        found = job()
        found.report.dry_run = dry_run
        found.enter(Phase.ABORTED) if dry_run else found.end()
        return found

    async def run():
        servers = [routes.PipeliveEndpoints() for _ in range(2)]
        for server in servers:
            server._engine, server._metrics = engine, metrics
        for added in (ended(dry_run=False), ended(dry_run=True), failed("no"), failed("no"), job()):
            engine.jobs.add(added)  # as by the calls of Python
        engine.live = 5
        for server in servers:
            await server._count()
        assert counted() == [1.0, 2.0, 1.0]
        assert value("kv_blocks", state="live") == 5
        assert value("stop_seconds_count") == 1
        engine.jobs.last.end()
        engine.live = 6
        looking = asyncio.ensure_future(servers[0]._look())
        while value("kv_blocks", state="live") != 6:
            await asyncio.sleep(0)
        looking.cancel()
        assert counted() == [2.0, 2.0, 1.0]

    monkeypatch.setattr(routes, "_LOOK_EVERY_S", 0.0)
    engine, metrics = Engine(), routes.Metrics()
    asyncio.run(run())

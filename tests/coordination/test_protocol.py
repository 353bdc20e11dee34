import protocol_doc
import pytest

from pipelive_kv import messages
from pipelive_kv.errors import ProtocolError
from pipelive_kv.protocol import (
    DISCARDED,
    HELD_TOO_LONG,
    JOB,
    RECORD_ABORT,
    RECORD_COMMIT,
    SCHEDULER,
    STAGE,
    STAMP,
    STAMP_K,
    Age,
    Course,
    Machine,
    Phase,
    Rule,
    SchedulerState,
    StageState,
    age_of,
    event_of,
)

OWN = {STAMP, STAMP_K, DISCARDED, HELD_TOO_LONG, RECORD_COMMIT, RECORD_ABORT}


def test_the_document_shows_the_tables_of_the_code():
    text = protocol_doc.DOCUMENT.read_text()
    assert protocol_doc.with_parts(text) == text


def test_every_event_is_a_message_or_one_of_the_engine():
    asked = {ask.event for asks in JOB.asks.values() for ask in asks}
    known = asked | {"Observe"} | OWN
    taken = {rule.event for machine in (STAGE, SCHEDULER) for rule in machine.rules}
    assert taken == known
    for event in known - OWN:
        assert hasattr(messages, event.removesuffix("(commit)").removesuffix("(abort)"))


def test_every_state_can_be_reached_and_left():
    for machine, states in ((STAGE, StageState), (SCHEDULER, SchedulerState)):
        for state in set(states) - {machine.start}:
            assert any(rule.then is state is not rule.state for rule in machine.rules), state
            assert any(rule.state is state is not rule.then for rule in machine.rules), state
    for phase in Phase:
        sources = {edge.source for edge in JOB.edges}
        assert (phase in sources) != phase.is_final
    assert {edge.target for edge in JOB.edges} == set(Phase) - {Phase.PLANNED, Phase.RECOVERING}


def test_what_is_refused_is_named():
    with pytest.raises(
        ProtocolError, match="stage 1 does not take Connect of a new epoch in state"
    ):
        STAGE.next(StageState.IDLE, "Connect", Age.NEW, "stage 1")
    with pytest.raises(ProtocolError, match=r"the scheduler does not take Settle\(abort\)"):
        SCHEDULER.next(SchedulerState.COMMITTED, "Settle(abort)", Age.SESSION)
    with pytest.raises(ValueError, match="two rules"):
        Machine("it", StageState.IDLE, [Rule(StageState.IDLE, "Arm", Age.NEW, StageState.IDLE)] * 2)


@pytest.mark.parametrize(
    ("epoch", "session", "age"),
    [
        (None, 5, Age.NONE),
        (5, 5, Age.SESSION),
        (3, None, Age.RUNNING),
        (2, None, Age.OLD),
        (4, None, Age.OLD),
        (5, None, Age.NEW),
        (5, 6, Age.OLD),
        (7, 6, Age.NEW),
    ],
)
def test_ages(epoch, session, age):
    assert age_of(epoch, session=session, running=3, given_up=4) is age


def test_messages_have_their_names():
    assert event_of(messages.Settle(1, commit=True)) == "Settle(commit)"
    assert event_of(messages.Settle(1, commit=False)) == "Settle(abort)"
    assert event_of(messages.Arm(1, 1.0)) == "Arm"


def test_a_course_keeps_to_the_table():
    course = Course()
    with pytest.raises(ProtocolError, match="must not ask Arm in phase planned"):
        course.check_ask("Arm")
    with pytest.raises(ProtocolError, match="before all have answered Describe, DescribeScheduler"):
        course.enter(Phase.ADMITTED)
    with pytest.raises(ProtocolError, match="from planned to switching"):
        course.enter(Phase.SWITCHING)
    for phase in (
        Phase.ADMITTED,
        Phase.STAGING,
        Phase.PATCHING,
        Phase.WRITE_THROUGH,
        Phase.ARMED,
    ):
        for ask in JOB.asks[course.phase]:
            course.check_ask(ask.event)
            course.answered(ask.event)
        course.enter(phase)
    course.answered("Arm")
    course.answered("Propose")
    with pytest.raises(ProtocolError, match="before commit is on record"):
        course.enter(Phase.SWITCHING)
    course.enter(Phase.ABORTING)
    with pytest.raises(ProtocolError, match="must not ask Abort before abort is on record"):
        course.check_ask("Abort")
    course.recorded = "commit"
    course.enter(Phase.SWITCHING)
    course.check_ask("Commit")
    with pytest.raises(ProtocolError, match="before all have answered"):
        course.enter(Phase.RELEASING)
    course.enter(Phase.DONE, lost=True)

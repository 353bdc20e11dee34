"""A model of the protocol that is small enough to be walked through completely.

Three stages; layer A moves from stage 1 up to stage 0, layer B from stage 1 down to stage 2, which
holds nothing before. A step runs on stage 0, then 1, then 2. The coordinator, the stages and the
scheduler do what the tables of `pipelive_kv.protocol` allow, in every order; a request may be lost,
or its answer, or it is delivered twice; the coordinator may die at any point and a new one take
over, while the old one, if it was only stopped, still writes what it was about to; stage 2 may die.
"""

from __future__ import annotations

from collections import deque

from protocol_world import (
    EMPTY,
    EPOCH,
    SOURCES,
    TARGETS,
    UNDECIDED,
    BrokenError,
    Coordinator,
    Faults,
    Faulty,
    Scheduler,
    Stage,
    Tables,
    Violation,
    World,
    with_stage,
)

from pipelive_kv.protocol import (
    DISCARDED,
    HELD_TOO_LONG,
    RECORD_ABORT,
    RECORD_COMMIT,
    STAMP,
    STAMP_K,
    Phase,
    SchedulerState,
    StageState,
    age_of,
)


class Explorer:
    """Walks through everything that can happen, breadth first."""

    def __init__(self, tables: Tables, faults: Faults) -> None:
        self.tables = tables
        self.faults = faults
        self.asks = {phase: self._asks_of(phase) for phase in Phase}
        # Looking a rule up by three enums costs more than all the rest of a transition.
        self._stage = {(r.state, r.event, r.age): r.then for r in tables.stage.rules}
        self._scheduler = {(r.state, r.event, r.age): r.then for r in tables.scheduler.rules}

    def _asks_of(self, phase: Phase) -> tuple:
        """The phase's asks, without those that change nothing and are never refused."""
        idle = {"LoadWeights", "AwaitConverged", "ListLive", "Describe", "DescribeScheduler"}
        found = self.tables.job.asks.get(phase, ())
        return tuple(ask for ask in found if not ask.optional and ask.event not in idle)

    def start(self) -> World:
        given = self.faults
        return World(
            Coordinator(),
            (Stage(), Stage(), Stage()),
            Scheduler(),
            (),
            ("", -1),
            frozenset(),
            -1,
            Faulty(given.losses, given.repeats, given.crashes, given.deaths),
        )

    # -- walking -----------------------------------------------------------------------------------

    def explore(self, limit: int = 2_000_000) -> tuple[int, Violation | None]:
        """The number of states, and the first violation with the shortest way to it."""
        start = self.start()
        number = {start: 0}
        came_from: list[tuple[int, str]] = [(-1, "")]
        before: list[list[int]] = [[]]
        ends: list[int] = []
        queue = deque([start])
        while queue:
            world = queue.popleft()
            here = number[world]
            try:
                self.check(world)
                for label, after in self.moves(world):
                    there = number.get(after)
                    if there is None:
                        there = number[after] = len(number)
                        came_from.append((here, label))
                        before.append([])
                        queue.append(after)
                    before[there].append(here)
            except BrokenError as broken:
                return len(number), Violation(str(broken), self._trace(came_from, here))
            if self.is_end(world):
                ends.append(here)
            if len(number) > limit:
                raise AssertionError(f"more than {limit} states: bound the model further")
        return len(number), self._stuck(number, came_from, before, ends)

    def _stuck(self, number, came_from, before, ends) -> Violation | None:
        """Every run can end: from every state an end can be reached."""
        can_end = bytearray(len(number))
        todo = list(ends)
        for index in todo:
            can_end[index] = 1
        while todo:
            for index in before[todo.pop()]:
                if not can_end[index]:
                    can_end[index] = 1
                    todo.append(index)
        for index in range(len(number)):
            if not can_end[index]:
                return Violation("no end can be reached", self._trace(came_from, index))
        return None

    @staticmethod
    def _trace(came_from, index) -> list[str]:
        labels = []
        while index > 0:
            index, label = came_from[index]
            labels.append(label)
        return labels[::-1]

    # -- what can happen ---------------------------------------------------------------------------

    def moves(self, world: World):
        yield from self._coordinate(world)
        yield from self._deliver(world)
        yield from self._schedule(world)
        yield from self._run(world)
        yield from self._fail(world)

    def _decide(self, world: World, outcome: str, k: int) -> World:
        return world if world.record[0] else world._replace(record=(outcome, k))

    def _enter(self, world: World, phase: Phase) -> World:
        coordinator = world.coordinator._replace(phase=phase, ask=-1, waits=frozenset())
        return self._ask_next(world._replace(coordinator=coordinator))

    def _ask_next(self, world: World) -> World:
        """Send the next ask of the phase; what the record must say first is looked at later."""
        coordinator = world.coordinator
        asks = self.asks[coordinator.phase]
        index = coordinator.ask + 1
        if index >= len(asks):
            return world._replace(
                coordinator=coordinator._replace(ask=len(asks), waits=frozenset())
            )
        ask = asks[index]
        to = (-1,) if ask.of == "scheduler" else (0, 1, 2)
        if ask.record is not None and ask.record != coordinator.recorded:
            # Not before the record was asked; see _coordinate.
            return world._replace(coordinator=coordinator._replace(ask=-1))
        return world._replace(
            coordinator=coordinator._replace(ask=index, waits=frozenset(to)),
            requests=world.requests | {(ask.event, one) for one in to},
        )

    def _coordinate(self, world: World):
        coordinator = world.coordinator
        phase = coordinator.phase
        if phase.is_final:
            return
        job = self.tables.job
        if coordinator.ask < 0:  # the record must be asked before anybody else is
            told = self._decide(world, "abort", -1)
            outcome, k = told.record
            coordinator = coordinator._replace(recorded=outcome, k=k)
            told = told._replace(coordinator=coordinator)
            if outcome == "commit" and phase is Phase.ABORTING:
                yield "the record says commit", self._enter(told, Phase.SWITCHING)
            else:
                yield "the record says abort", self._ask_next(told)
            return
        edges = [edge for edge in job.edges if edge.source is phase]
        if phase in UNDECIDED or any(edge.target is Phase.ABORTING for edge in edges):
            yield "an error", self._enter(world, Phase.ABORTING)
        dead = {index for index, stage in enumerate(world.stages) if not stage.alive}
        if coordinator.waits & dead and phase not in UNDECIDED:
            if phase is Phase.ABORTING:
                rest = coordinator._replace(waits=coordinator.waits - dead)
                yield "the dead need not answer", world._replace(coordinator=rest)
            else:
                yield (
                    "somebody is lost",
                    world._replace(
                        coordinator=coordinator._replace(phase=Phase.DONE, waits=frozenset())
                    ),
                )
            return
        if coordinator.waits:
            asked = self.asks[phase][coordinator.ask].event
            again = {(asked, one) for one in coordinator.waits} - world.requests
            if phase not in UNDECIDED and again:
                yield "asks again", world._replace(requests=world.requests | again)
            return
        if coordinator.ask < len(self.asks[phase]) - 1:
            yield "asks on", self._ask_next(world)
            return
        yield from self._leave(world, [edge for edge in edges if not edge.lost])

    def _leave(self, world: World, edges):
        """All have answered: on to the next phase, by the record where the table says so."""
        coordinator = world.coordinator
        phase = coordinator.phase
        onward = [e for e in edges if e.target not in (Phase.ABORTING, Phase.ABORTED)]
        if phase is Phase.ABORTING:
            onward = [e for e in edges if e.target is Phase.ABORTED]
        (edge,) = onward
        if edge.record is None or edge.record == coordinator.recorded:
            yield f"enters {edge.target.value}", self._enter(world, edge.target)
            return
        told = self._decide(world, edge.record, coordinator.k)
        if told.record[0] == edge.record:
            decided = told._replace(coordinator=coordinator._replace(recorded=edge.record))
            yield f"records {edge.record}", self._enter(decided, edge.target)
        else:
            yield "is too late to record", self._enter(told, Phase.ABORTING)

    def _deliver(self, world: World):
        for event, to in world.requests:
            taken = world._replace(requests=world.requests - {(event, to)})
            if to >= 0 and not world.stages[to].alive:
                yield f"{event} reaches nobody", taken
                continue
            handled = self._scheduled(taken, event) if to < 0 else self._staged(taken, event, to)
            name = "the scheduler" if to < 0 else f"stage {to}"
            if handled is None:
                continue  # it waits for something
            after, answered = handled
            done = self._answered(after, event, to) if answered else after
            yield f"{event} reaches {name}", done
            faults = world.faults
            if faults.losses:
                less = faults._replace(losses=faults.losses - 1)
                yield f"{event} to {name} is lost", taken._replace(faults=less)
                if answered:
                    yield f"{name}'s answer to {event} is lost", after._replace(faults=less)
            if faults.repeats:
                less = faults._replace(repeats=faults.repeats - 1)
                yield (
                    f"{event} reaches {name}, and will once more",
                    done._replace(faults=less, requests=done.requests | {(event, to)}),
                )

    def _answered(self, world: World, event: str, by: int) -> World:
        coordinator = world.coordinator
        if by not in coordinator.waits:
            return world
        if self.asks[coordinator.phase][coordinator.ask].event != event:
            return world
        coordinator = coordinator._replace(waits=coordinator.waits - {by})
        if event == "Propose":
            coordinator = coordinator._replace(k=world.scheduler.k)
        return world._replace(coordinator=coordinator)

    def _scheduled(self, world: World, event: str) -> tuple[World, bool] | None:
        scheduler = world.scheduler
        then = self._scheduler_rule(scheduler, event)
        if then is None:
            return world, False
        after = scheduler._replace(state=then)
        if event == "Propose" and scheduler.state is not then:
            after = after._replace(k=len(world.stamps) + 1)
        if event == "Settle(abort)":
            after = after._replace(given_up=EPOCH, k=-1)
        return world._replace(scheduler=after), True

    def _scheduler_rule(self, scheduler: Scheduler, event: str) -> SchedulerState | None:
        session = EPOCH if scheduler.state is not SchedulerState.SERVING else None
        age = age_of(
            None if event == STAMP else EPOCH,
            session=session,
            running=scheduler.epoch,
            given_up=scheduler.given_up,
        )
        return self._scheduler.get((scheduler.state, event, age))

    def _stage_rule(self, stage: Stage, event: str) -> StageState | None:
        session = EPOCH if stage.state is not StageState.IDLE else None
        age = age_of(EPOCH, session=session, running=stage.epoch, given_up=stage.given_up)
        return self._stage.get((stage.state, event, age))

    def _tail_sent(self, world: World, index: int) -> bool:
        """Whether the stage has sent every write of the steps below k to its targets."""
        stage = world.stages[index]
        if not TARGETS[index]:
            return True
        return (stage.told or stage.epoch == EPOCH) and stage.ran >= world.record[1]

    def _tails_there(self, world: World, index: int) -> bool:
        return all(self._tail_sent(world, source) for source in SOURCES[index])

    def _staged(self, world: World, event: str, index: int) -> tuple[World, bool] | None:
        stage = world.stages[index]
        then = self._stage_rule(stage, event)
        if then is None:
            return world, False
        if event in ("AwaitSwitched", "Release") and stage.state is not StageState.IDLE:
            through = stage.epoch == EPOCH and stage.ran > world.record[1]
            sent = self._tail_sent(world, index) and self._tails_there(world, index)
            if not (through and sent):
                return None
        changes: dict[str, object] = {"state": then}
        if event == "Abort":
            if then is StageState.ABORTING:  # answered when all is taken back
                then = self._stage_rule(stage._replace(state=then), DISCARDED)
                return with_stage(world, index, state=then, given_up=EPOCH, voted=False), True
            changes["given_up"] = EPOCH if stage.epoch != EPOCH else stage.given_up
        if event == "Arm":
            changes["voted"] = True
        if event == "Commit":
            changes["told"] = stage.state is not StageState.IDLE
        if event == "Release":
            changes["told"] = False
        return with_stage(world, index, **changes), True

    def _schedule(self, world: World):
        scheduler = world.scheduler
        now = len(world.stamps)
        if now < self.faults.steps and (
            scheduler.state is SchedulerState.SERVING or now < scheduler.k
        ):
            # With few steps, none is spent on what happens before there is a k.
            early = self.faults.steps - 2
            asked = scheduler.k >= 0 or scheduler.given_up
            if (asked or now < early) and self._scheduler_rule(scheduler, STAMP) is not None:
                yield "a step is stamped", world._replace(stamps=(*world.stamps, scheduler.epoch))
        if now == scheduler.k and scheduler.epoch != EPOCH:
            then = self._scheduler_rule(scheduler, STAMP_K)
            if then is not None:
                yield (
                    "k is stamped",
                    world._replace(
                        stamps=(*world.stamps, EPOCH),
                        scheduler=scheduler._replace(state=then, epoch=EPOCH),
                    ),
                )
            if self._scheduler_rule(scheduler, RECORD_ABORT) is not None:
                yield "the scheduler asks the record", self._asked(world)
        then = self._scheduler_rule(scheduler, HELD_TOO_LONG)
        if then is not None:
            yield (
                "the scheduler has waited for too long",
                world._replace(scheduler=scheduler._replace(state=then, k=-1, given_up=EPOCH)),
            )

    def _asked(self, world: World) -> World:
        told = self._decide(world, "abort", -1)
        scheduler = told.scheduler
        if told.record[0] == "commit":
            then = self._scheduler_rule(scheduler, RECORD_COMMIT)
            return told._replace(scheduler=scheduler._replace(state=then))
        then = self._scheduler_rule(scheduler, RECORD_ABORT)
        return told._replace(scheduler=scheduler._replace(state=then, given_up=EPOCH, k=-1))

    def _run(self, world: World):
        """A stage runs its next step, or takes back what it did for a given-up epoch."""
        previous = self.faults.steps + 1
        for index, stage in enumerate(world.stages):
            if not stage.alive:
                continue  # it holds nothing, so the engine leaves it out; see check
            seq = stage.ran
            if seq < len(world.stamps) and seq < previous:
                yield from self._step(world, index, seq)
            previous = stage.ran
            then = self._stage_rule(stage, DISCARDED)
            if then is not None:
                yield (
                    f"stage {index} has taken all back",
                    with_stage(world, index, state=then, given_up=EPOCH, voted=False),
                )

    def _step(self, world: World, index: int, seq: int):
        stage = world.stages[index]
        epoch = world.stamps[seq]
        if epoch == stage.epoch:
            if epoch == EPOCH and not self._tails_there(world, index):
                return  # the gate
            yield f"stage {index} runs step {seq}", with_stage(world, index, ran=seq + 1)
            return
        then = self._stage_rule(stage, STAMP_K)
        if then is None:
            raise BrokenError(
                f"stage {index} gets step {seq} of the new epoch in state {stage.state.value}"
            )
        if not stage.voted:
            raise BrokenError(f"stage {index} activates un-armed")
        # It activates; the step runs when its gate opens.
        yield f"stage {index} activates", with_stage(world, index, state=then, epoch=EPOCH)

    def _fail(self, world: World):
        faults, coordinator = world.faults, world.coordinator
        if faults.crashes and not coordinator.phase.is_final:
            ready = coordinator.phase is Phase.ARMED and not coordinator.waits
            armed = ready and coordinator.ask >= len(self.asks[Phase.ARMED]) - 1
            # Whatever happens before the new one speaks can happen before it is heard as well.
            after = world._replace(
                coordinator=Coordinator(phase=Phase.RECOVERING),
                zombie=coordinator.k if armed else -1,
                faults=faults._replace(crashes=faults.crashes - 1),
            )
            yield (
                f"the coordinator dies in {coordinator.phase.value}, another one comes",
                self._enter(after, Phase.ABORTING),
            )
        if world.zombie >= 0:
            told = self._decide(world, "commit", world.zombie)._replace(zombie=-1)
            if told.record[0] == "commit":
                orders = {("Settle(commit)", -1), *(("Commit", stage) for stage in (0, 1, 2))}
                told = told._replace(requests=told.requests | orders)
            yield "the stopped coordinator goes on", told
        if faults.deaths and world.record[0] != "commit":
            less = faults._replace(deaths=faults.deaths - 1)
            yield "stage 2 dies", with_stage(world, EMPTY, alive=False)._replace(faults=less)

    # -- the rules ---------------------------------------------------------------------------------

    def check(self, world: World) -> None:
        outcome, k = world.record
        committed = outcome == "commit"
        phase = world.coordinator.phase
        if world.scheduler.epoch == EPOCH and not committed:
            raise BrokenError("the scheduler serves the new placement without the decision")
        if world.scheduler.given_up and committed:
            raise BrokenError("the scheduler has given up what is committed")
        for seq, epoch in enumerate(world.stamps):
            if (epoch == EPOCH) != (committed and seq >= k):
                raise BrokenError(f"step {seq} is stamped for epoch {epoch}, the record {outcome}")
        for index, stage in enumerate(world.stages):
            if not stage.alive:
                continue
            if stage.epoch == EPOCH and not committed:
                raise BrokenError(f"stage {index} runs the new placement without the decision")
            if stage.given_up and committed:
                raise BrokenError(f"stage {index} has given up what is committed")
            if phase is Phase.ABORTED and (stage.state, stage.epoch) != (StageState.IDLE, 0):
                raise BrokenError(f"stage {index} is {stage.state.value} after the abort")
            done = phase is Phase.DONE and not self._is_lost(world)
            if done and (stage.state, stage.epoch) != (StageState.IDLE, EPOCH):
                raise BrokenError(f"stage {index} is {stage.state.value} after the end")
        if phase is Phase.ABORTED and world.scheduler.state is not SchedulerState.SERVING:
            raise BrokenError("the scheduler still waits after the abort")

    def _is_lost(self, world: World) -> bool:
        """A stage died that has layers in what is committed: the service ends."""
        return world.record[0] == "commit" and not all(stage.alive for stage in world.stages)

    def is_end(self, world: World) -> bool:
        phase = world.coordinator.phase
        if self._is_lost(world):
            return True
        if not phase.is_final:
            return False
        living = [stage for stage in world.stages if stage.alive]
        ended = all(stage.state is StageState.IDLE for stage in living)
        steps = len(world.stamps) == self.faults.steps and all(
            stage.ran == self.faults.steps for stage in living
        )
        return ended and steps and world.scheduler.state is SchedulerState.SERVING

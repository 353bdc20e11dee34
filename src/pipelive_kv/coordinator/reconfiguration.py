"""The phases of a reconfiguration up to its decision, in the protocol's order."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

from pipelive_kv.coordinator.ending import Ending
from pipelive_kv.coordinator.fanout import Fanout
from pipelive_kv.coordinator.job import Job
from pipelive_kv.coordinator.options import MigrationOptions
from pipelive_kv.coordinator.report import Report
from pipelive_kv.errors import CancelledError, OverBudgetError, ProtocolError
from pipelive_kv.messages import (
    Admit,
    Admitted,
    Arm,
    AwaitConverged,
    AwaitResize,
    AwaitStep,
    Connect,
    Converged,
    Done,
    Held,
    Hold,
    ListLive,
    LiveBlocks,
    LoadWeights,
    Prepare,
    Prepared,
    Propose,
    Proposed,
    Resized,
    Shrink,
    StartCopy,
    Throttle,
    WriteThrough,
)
from pipelive_kv.protocol import Phase
from pipelive_kv.record import Decision, DecisionRecord

_DECIDE_WITHIN = 10.0
"""Seconds that the scheduler waits at k for word of the decision, while the coordinator lives."""


class DryRunEnd(CancelledError):  # noqa: N818 - it is no error
    """All has been tried but the switchover."""


@dataclass(frozen=True)
class Wave:
    """How a reconfiguration stands to the others that it may be one wave of."""

    capacity: int
    """When it begins."""
    first_capacity: int
    """When the first one began."""
    limit: int
    """What the capacity stays at or below until the last one is over."""
    is_last: bool


class Reconfiguration(Ending):
    """One reconfiguration from the beginning."""

    _decides = True

    resume = False
    """Whether the stages have kept the layers that they gain."""

    room = -1
    """The blocks that every stage can hold afterwards, once that is known."""

    def __init__(
        self,
        fanout: Fanout,
        record: DecisionRecord,
        record_dir: str,
        job: Job,
        report: Report,
        options: MigrationOptions,
        wave: Wave,
    ) -> None:
        super().__init__(fanout, record, job, report, capacity_after=report.capacity_before)
        self._record_dir = record_dir
        self._options = options
        self._stages = report.new.stages
        self._wave = wave
        self._keeps = job.lease is not None

    def until_decided(self) -> None:
        """All phases that can still be taken back, and the decision."""
        with self._to.checking(self._job.rest):
            self._admit()
            self._stage()
            self._patch()
            self._write_through()
            self._arm()
            if self._options.dry_run:
                raise DryRunEnd("a dry run ends here")
            self._decide()

    # admitted: the budget rule, and the shrink that makes room

    def _admit(self) -> None:
        to, job, report = self._to, self._job, self._report
        job.enter(Phase.ADMITTED)
        if not report.moves:
            self.room = self._after
            return
        admitted = to.all(lambda _: Admit(self.epoch, self._stages), Admitted, job.rest())
        lacking = [answer.reason for answer in admitted if answer.reason]
        if lacking:
            raise OverBudgetError("; ".join(lacking))
        wave = self._wave
        during = min(wave.capacity, wave.limit, *(answer.during for answer in admitted))
        self.room = min(answer.after for answer in admitted)
        if self._options.keep_capacity:
            self.room = min(self.room, wave.first_capacity)
        # Between two waves nothing may become live that the next one has no room for.
        self._after = self.room if wave.is_last else during
        if during < wave.capacity:
            resized = to.scheduler(Shrink(self.epoch, during, job.rest()), Resized, job.rest())
            report.capacity_during, report.blocks_moved = resized.capacity, resized.moved
            self._resize = resized.resize
            to.all(lambda _: AwaitResize(resized.resize, job.rest()), Done, job.rest())

    # staging: room, connections, the bulk of the KV and the weights

    def _stage(self) -> None:
        to, job, options = self._to, self._job, self._options
        job.enter(Phase.STAGING)
        moves = self._report.moves
        prepared = to.all(
            lambda rank: Prepare(
                self.epoch,
                self._stages,
                tuple((move.source, move.layers) for move in moves if move.target == rank),
                options.weights_from,
                options.verify,
                job.rest(),
                lease=self._keeps,
                resume=self.resume,
            ),
            Prepared,
            job.rest(),
        )
        outgoing: dict[int, list[tuple[int, tuple[int, ...], str]]] = {}
        for rank, answer in zip(to.ranks, prepared, strict=True):
            incoming = [move for move in moves if move.target == rank]
            for move, address in zip(incoming, answer.addresses, strict=True):
                outgoing.setdefault(move.source, []).append((rank, move.layers, address))
        if options.mode == "stop_and_copy":
            # The weights are loaded before the engine is held: what is compared is the KV.
            if options.weights_from == "source":
                self._load_weights()
            held = to.scheduler(Hold(self.epoch, job.rest()), Held, job.rest())
            to.all(lambda _: AwaitStep(held.last_seq, job.rest()), Done, job.rest())
        to.all(
            lambda rank: Connect(
                self.epoch,
                self._stages,
                tuple(outgoing.get(rank, ())),
                options.weights_from,
                options.verify,
                options.rate_limit,
                job.rest(),
                self.resume,
            ),
            Done,
            job.rest(),
        )
        # After every source has started its log: what is written from now on is in a log, what was
        # written before is in a block that is live now.
        live = to.scheduler(ListLive(), LiveBlocks, job.rest())
        to.all(
            lambda _: StartCopy(
                self.epoch, live.runs, options.max_stop_ms, options.max_rounds, job.rest()
            ),
            Done,
            job.rest(),
        )
        if not (options.mode == "stop_and_copy" and options.weights_from == "source"):
            self._load_weights()

    def _load_weights(self) -> None:
        job = self._job
        self._to.all(lambda _: LoadWeights(self.epoch, job.rest()), Done, job.rest())

    # patching: rounds until the predicted stop time is small

    def _patch(self) -> None:
        job, options, report = self._job, self._options, self._report
        job.enter(Phase.PATCHING)
        end = time.monotonic() + (options.max_seconds or math.inf)
        while True:
            found = self._await_converged(end)
            if not any(answer.stalled for answer in found):
                report.converged = found
                return
            self._throttle()

    def _await_converged(self, end: float) -> tuple[Converged, ...]:
        limit = min(self._job.rest(), max(0.0, end - time.monotonic()))
        return self._to.all(
            lambda _: AwaitConverged(self.epoch, limit), Converged, self._job.rest()
        )

    def _throttle(self) -> None:
        """The steps write as fast as their writes can be sent: the engine is asked for less."""
        share = max(self._options.min_throttle, self._report.throttle / 2)
        if share < self._report.throttle and self._options.mode == "live":
            request = Throttle(self.epoch, share, self._job.rest())
            self._to.scheduler(request, Done, self._job.rest())
            self._report.throttle = share

    # write-through: what is left is what each step writes, and it goes out at the step's end

    def _write_through(self) -> None:
        job = self._job
        job.enter(Phase.WRITE_THROUGH)
        self._to.all(lambda _: WriteThrough(self.epoch, job.rest()), Done, job.rest())

    # armed: every stage has voted

    def _arm(self) -> None:
        job = self._job
        job.enter(Phase.ARMED)
        self._to.all(lambda _: Arm(self.epoch, job.rest()), Done, job.rest())
        if self._options.pause:
            self._await_proceed()

    def _await_proceed(self) -> None:
        self._job.await_proceed()

    def _decide(self) -> None:
        to, job, options = self._to, self._job, self._options
        proposed = to.scheduler(
            Propose(
                self.epoch,
                self._stages,
                self._record_dir,
                options.margin,
                min(_DECIDE_WITHIN, job.rest()),
            ),
            Proposed,
            job.rest(),
        )
        job.rest()
        decision = self._record.decide(
            Decision(
                self.epoch,
                "commit",
                step=proposed.step,
                stages=self._stages,
                capacity=self.room,
            )
        )
        job.course.recorded = decision.outcome
        if decision.outcome != "commit":
            raise ProtocolError(f"epoch {self.epoch} was given up: {decision.reason}")
        self._report.step = decision.step

"""The driver: takes requests, stamps steps, sends them out and hands tokens back."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from pipelive_kv.blocks import BlockAllocator
from pipelive_kv.control import ControlEndpoint, ControlKey
from pipelive_kv.coordinator import Coordinator, MigrationOptions
from pipelive_kv.engines.reference.batcher import Batcher
from pipelive_kv.engines.reference.config import (
    EngineConfig,
    EngineFailedError,
    Request,
    RequestResult,
    StageTimes,
    StepRecord,
)
from pipelive_kv.engines.reference.messages import Meet, StepDone
from pipelive_kv.engines.reference.processes import StageProcesses, private_folder
from pipelive_kv.engines.reference.worker import Launch
from pipelive_kv.errors import ClosedError, DeadlineError, InvalidArgumentError
from pipelive_kv.placement import Placement
from pipelive_kv.scheduler import Scheduler

if TYPE_CHECKING:
    from pipelive_kv.coordinator import Job

__all__ = ["Engine"]

OnToken = Callable[[int, int, float], None]
OnStep = Callable[[StepRecord], None]


@dataclass
class _Issued:
    """A step under way."""

    epoch: int
    kind: str
    rows: int
    issued: float
    expected: set[int]
    """Ranks that report it."""
    last: int
    """The rank with the last layer, which draws the tokens."""
    reports: dict[int, StepDone] = field(default_factory=dict)


class Engine:
    """Serves requests over a pipeline of stage processes. Use it as a context manager.

    `submit` and `reconfigure` may be called from any thread, also while `run` runs in another.

    Raises:
        EngineFailedError: if a stage cannot start; it says which one and why.
        UnsupportedModelError: if the model cannot be run in stages.
    """

    def __init__(self, config: EngineConfig) -> None:
        from pipelive_kv.engines.transformers import TransformersModel  # noqa: PLC0415

        model = TransformersModel(config.model, dtype=config.dtype)
        if config.placement.num_layers != model.num_layers:
            raise InvalidArgumentError(
                f"the placement {config.placement} has {config.placement.num_layers} layers, "
                f"the model {model.num_layers}"
            )
        self.config = config
        self._vocab_size = model.vocab_size
        self._allocator = BlockAllocator(config.max_blocks, config.first_capacity)
        self._batcher = Batcher(
            config,
            self._allocator,
            model.eos_token_ids,
            is_hazard=self._is_hazard,
        )
        self._lock = threading.Lock()
        self._submitted: list[tuple[int, Request, float]] = []
        self._next_id = 0
        self._arrivals: dict[int, tuple[int, float]] = {}  # request id -> arrival step, submitted
        self._results: dict[int, RequestResult] = {}
        self._issued: dict[int, _Issued] = {}
        self._done: queue.SimpleQueue[tuple[int, float] | None] = queue.SimpleQueue()
        self._closed = False
        self._coordinator: Coordinator | None = None
        self._scheduler: Scheduler | None = None
        self._stages: StageProcesses | None = None
        self._members: tuple[int, ...] = tuple(range(config.placement.num_stages))
        self._group = self._groups = 0
        self._membership = threading.Condition()
        self._wants_step = False
        try:
            self._start()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- what callers use ----------------------------------------------------------------------

    @property
    def placement(self) -> Placement:
        """The placement of the step that was issued last."""
        return self.scheduler.placement

    @property
    def scheduler(self) -> Scheduler:
        """The scheduler that stamps the steps."""
        if self._scheduler is None:
            raise ClosedError("the engine is closed")
        return self._scheduler

    @property
    def coordinator(self) -> Coordinator:
        """The coordinator of a reconfigurable engine."""
        if self._coordinator is None:
            raise InvalidArgumentError("the engine was not made reconfigurable")
        return self._coordinator

    @property
    def preempted(self) -> int:
        """How often a request was preempted so that layers could move; see `EngineConfig`."""
        return self._batcher.preempted

    @property
    def pids(self) -> tuple[int, ...]:
        """Process ids of the stages, by rank."""
        return self._stages.pids if self._stages is not None else ()

    def submit(self, request: Request) -> int:
        """Hand a request in; `run` serves it. Returns its id: 0, 1, 2, ...

        Raises:
            InvalidArgumentError: if it can never be served; the message names the limit.
        """
        self._batcher.check(request)
        if not all(0 <= token < self._vocab_size for token in request.prompt):
            raise InvalidArgumentError(f"prompt tokens must be 0 to {self._vocab_size - 1}")
        with self._lock:
            if self._closed:
                raise ClosedError("the engine is closed")
            request_id, self._next_id = self._next_id, self._next_id + 1
            self._submitted.append((request_id, request, time.monotonic()))
        self._done.put(None)
        return request_id

    def run(
        self,
        *,
        until: Callable[[], bool] | None = None,
        on_token: OnToken | None = None,
        on_step: OnStep | None = None,
    ) -> dict[int, RequestResult]:
        """Serve until there is nothing left to serve.

        Args:
            until: keep running, idle if need be, until this returns true as well.
            on_token: called with request id, token and the time it came back.
            on_step: called with every finished step.

        Returns:
            All requests served so far, by id.

        Raises:
            EngineFailedError: if a stage dies or raises.
            DeadlineError: if a step does not come back in time; it names the stages that have not
                answered.
        """
        while True:
            self._take_submitted()
            self._issue()
            if not self._issued and self._batcher.is_idle and (until is None or until()):
                with self._lock:
                    if not self._submitted:
                        return dict(self._results)
            self._wait(on_token, on_step)

    def reconfigure(
        self,
        placement: Placement,
        *,
        timeout: float = 60.0,
        options: MigrationOptions | None = None,
        **more: Any,
    ) -> Job:
        """Start to move layers; steps must go on for it to complete: see `Coordinator.reconfigure`.

        `run(until=lambda: job.phase.is_final)` keeps an idle engine going until it is over.
        """
        return self.coordinator.reconfigure(placement, timeout=timeout, options=options, **more)

    @property
    def stages(self) -> tuple[int, ...]:
        """The ranks of the stages that take part."""
        return self._members

    def add_stage(self, rank: int | None = None, *, timeout: float = 120.0) -> int:
        """Start one more stage; it holds no layer until a placement gives it some.

        Steps must go on meanwhile: call it from another thread than `run`.

        Args:
            rank: of a stage that has left; None: behind all that are or were there.
            timeout: seconds for its process to start, to connect and to take part in a step.

        Returns:
            Its rank.

        Raises:
            EngineFailedError: it could not start, or died; the others go on.
            BusyError: a reconfiguration, or another change, is under way.
            DeadlineError: it did not take part in time.
        """
        ends_at = time.monotonic() + timeout
        chosen = max(self.placement.num_stages, *(member + 1 for member in self._members))
        chosen = chosen if rank is None else rank
        try:
            self.coordinator.add_stage(
                chosen, lambda: self._attach(chosen, ends_at), timeout=timeout
            )
        except BaseException:
            if chosen not in self.coordinator.stages:
                self._detach(chosen)
            raise
        return chosen

    def remove_stage(self, rank: int, *, timeout: float = 60.0) -> None:
        """Let a stage that holds no layer any more go, and end its process.

        Raises:
            BusyError: it holds layers, or a reconfiguration is under way.
        """
        self.coordinator.remove_stage(rank, lambda: self._detach(rank), timeout=timeout)

    def _attach(self, rank: int, ends_at: float) -> None:
        stages = self._running()
        placement = self.placement.padded(max(self.placement.num_stages, rank + 1))
        stages.start(
            replace(self._launch, rank=rank, placement=placement, capacity=self._allocator.capacity)
        )
        stages.await_ready([rank], ends_at - time.monotonic())
        ranks = sorted({*self._members, rank})
        self._groups += 1
        group = self._groups
        stages.meet(Meet(group, ranks), ends_at - time.monotonic())
        with self._membership:
            self._members, self._group = tuple(ranks), group
            self._wants_step = True
            self._done.put(None)
            while self._wants_step:
                rest = ends_at - time.monotonic()
                if rest <= 0 or self._closed:
                    raise DeadlineError(f"no step was run in which stage {rank} could take part")
                self._membership.wait(min(rest, 0.2))

    def _detach(self, rank: int) -> None:
        with self._membership:
            self._members = tuple(member for member in self._members if member != rank)
        self._running().stop(rank)
        # What it had not reported any more.
        self._on_lost(rank)

    def close(self) -> None:
        """Stop the stages and leave nothing behind. May be called twice."""
        with self._lock:
            self._closed = True
        # The coordinator first: what is under way is given up while all others can still answer.
        if self._coordinator is not None:
            self._coordinator.close()
        if self._scheduler is not None:
            self._scheduler.close()
        if self._stages is not None:
            self._stages.close()

    # -- starting ------------------------------------------------------------------------------

    def _start(self) -> None:
        config, directory = self.config, private_folder()
        endpoint, key = None, b""
        if config.reconfigurable:
            secret = ControlKey.generate()
            key = secret.to_bytes()
            self._coordinator = Coordinator(
                ControlEndpoint(f"ipc://{directory}/control", secret),
                pp_size=config.placement.num_stages,
                record_dir=config.record_dir or f"{directory}/record",
            )
            endpoint = self._coordinator.endpoint
        address = endpoint.address if endpoint is not None else ""
        self._stages = StageProcesses(
            [
                Launch(
                    config,
                    rank,
                    directory,
                    address,
                    key,
                    config.placement,
                    config.first_capacity,
                )
                for rank in self._members
            ],
            self._on_done,
            self._on_lost,
        )
        self._launch = Launch(config, -1, directory, address, key, config.placement, 0, joins=True)
        self._scheduler = Scheduler(
            config.placement,
            allocator=self._allocator,
            control=endpoint,
            # A lane's next step is built from the results of its last one, but for prompts whose
            # chunks follow one another; the batcher puts those off around a switchover.
            reads_retired=config.chunks_in_flight == 1,
            defers_hazards=True,
        )
        self._scheduler.on_remap(self._batcher.remap)
        if config.preempt:
            self._scheduler.on_short(self._preempt)
        self._stages.await_ready(self._members, config.start_timeout)
        if self._coordinator is not None:
            self._coordinator.await_ready(config.start_timeout)

    # -- the loop ------------------------------------------------------------------------------

    def _running(self) -> StageProcesses:
        if self._stages is None or self._closed:
            raise ClosedError("the engine is closed")
        return self._stages

    def _take_submitted(self) -> None:
        with self._lock:
            new, self._submitted = self._submitted, []
        for request_id, request, submitted in new:
            self._batcher.add(request_id, request)
            self._arrivals[request_id] = (request.arrival_step, submitted)

    def _issue(self) -> None:
        """Send out steps until the next one's lane is busy or there is nothing to do."""
        scheduler, stages = self.scheduler, self._running()
        while not self._batcher.is_busy(scheduler.next_seq):
            if self._batcher.is_idle and not scheduler.wants_step and not self._wants_step:
                return
            stages.check()
            stamp = scheduler.stamp()
            now = time.monotonic()
            self._note_arrivals(stamp.seq, now)
            with self._membership:
                members = self._members
                self._batcher.group = self._group
                step, _ = self._batcher.build(stamp, scheduler.wanted_capacity)
                rows = sum(length > 0 for length in step.seq_lens)
                held = scheduler.placement.stages
                last = max(rank for rank, layers in enumerate(held) if layers)
                gone = [rank for rank, layers in enumerate(held) if layers and rank not in members]
                if gone:
                    raise EngineFailedError(f"stages {gone} have gone, and layers with them")
                self._issued[stamp.seq] = _Issued(
                    stamp.epoch, step.kind, rows, now, set(members), last
                )
                stages.send(step, members)
                self._wants_step = False
                self._membership.notify_all()

    def _preempt(self, lacking: int) -> None:
        scheduler = self.scheduler
        capacity = scheduler.wanted_capacity
        if capacity is not None:
            scheduler.freed(self._batcher.preempt(lacking, capacity))

    def _is_hazard(self, seq: int) -> bool:
        return self.scheduler.is_hazard(seq)

    def _note_arrivals(self, seq: int, now: float) -> None:
        for request_id, (step, submitted) in list(self._arrivals.items()):
            if step <= seq:
                # Who came before its step arrives with the step.
                arrival = now if step == seq else submitted
                self._results[request_id] = RequestResult(request_id, arrival=arrival)
                del self._arrivals[request_id]

    def _on_done(self, done: StepDone, now: float) -> None:
        """Called in the listening thread, also while `stamp` waits in ours."""
        with self._membership:
            issued = self._issued.get(done.seq)
            if issued is None or done.rank not in issued.expected:
                return
            issued.reports[done.rank] = done
            if issued.reports.keys() < issued.expected:
                return
        self.scheduler.retired(done.seq)
        self._done.put((done.seq, now))

    def _on_lost(self, rank: int) -> bool:
        """Called in the listening thread; a stage without layers is not missed."""
        if self._scheduler is None:
            return False
        with self._membership:
            placement = self._scheduler.placement
            if rank < placement.num_stages and placement.layers_of(rank):
                return False
            self._members = tuple(member for member in self._members if member != rank)
            over = []
            for seq, issued in sorted(self._issued.items()):
                if issued.last == rank and rank not in issued.reports:
                    return False
                if rank in issued.expected and rank not in issued.reports:
                    issued.expected.discard(rank)
                    if issued.reports.keys() >= issued.expected:
                        over.append(seq)
        for seq in over:
            self.scheduler.retired(seq)
            self._done.put((seq, time.monotonic()))
        return True

    def _wait(self, on_token: OnToken | None, on_step: OnStep | None) -> None:
        stages = self._running()
        try:
            event = self._done.get(timeout=0.05 if self._issued else 0.005)
        except queue.Empty:
            stages.check()
            self._check_deadline()
            return
        while event is not None:
            self._finish(*event, on_token, on_step)
            try:
                event = self._done.get_nowait()
            except queue.Empty:
                return

    def _finish(
        self, seq: int, now: float, on_token: OnToken | None, on_step: OnStep | None
    ) -> None:
        with self._membership:
            issued = self._issued.pop(seq)
        last = issued.reports[issued.last]
        for sequence, token in self._batcher.finish(seq, last.tokens):
            result = self._results[sequence.request_id]
            result.tokens.append(token)
            result.token_times.append(now)
            end = self._batcher.end_of(sequence)
            if end:
                self.scheduler.freed(self._batcher.remove(sequence))
                result.finish = "eos" if end == "eos" else "length"
            if on_token is not None:
                on_token(sequence.request_id, token, now)
        if on_step is not None:
            stages = tuple(
                StageTimes(r.rank, r.begin, r.start, r.end, r.gate, r.num_layers)
                for _, r in sorted(issued.reports.items())
            )
            on_step(
                StepRecord(seq, issued.epoch, issued.kind, issued.issued, now, issued.rows, stages)
            )

    def _check_deadline(self) -> None:
        if not self._issued:
            return
        seq = min(self._issued)
        issued = self._issued[seq]
        if time.monotonic() - issued.issued > self.config.step_timeout:
            silent = sorted(issued.expected - issued.reports.keys())
            raise DeadlineError(
                f"step {seq} ({issued.kind}) did not come back within "
                f"{self.config.step_timeout:.0f} s; stages {silent} have not reported it"
            )

"""The stage: runs steps in order, keeps the write log, and activates placements."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from pipelive_kv.control import ControlClient, ControlEndpoint
from pipelive_kv.errors import (
    ClosedError,
    DeadlineError,
    InvalidArgumentError,
    ProtocolError,
)
from pipelive_kv.kv import KVPool
from pipelive_kv.messages import Stamp, Switched
from pipelive_kv.placement import Placement, whole_stacks
from pipelive_kv.protocol import DISCARDED, STAGE, STAMP_K, Age, StageState, age_of
from pipelive_kv.stage.background import Background
from pipelive_kv.stage.hooks import EngineHooks, LayerWeights
from pipelive_kv.stage.kept import KeptLayers
from pipelive_kv.stage.limits import GATE_TIMEOUT, JOIN_TIMEOUT
from pipelive_kv.stage.service import StageService
from pipelive_kv.stage.session import StageSession
from pipelive_kv.tracker import DirtyTracker, Integers

Slots = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Step:
    """One step on one stage, between :meth:`Stage.begin` and :meth:`Stage.end`."""

    stamp: Stamp
    layers: tuple[int, ...]
    """The layers that the stage runs in this step, ascending."""
    _stage: Stage

    def gate(self, layer: int) -> None:
        """Call before the step runs ``layer``: waits until the layer's KV is complete.

        Returns at once for every layer but those that the stage has just gained.

        Raises:
            DeadlineError: the writes of earlier steps did not arrive in time.
            PipeliveError: the transfer failed.
        """
        self._stage.gate(self.stamp, layer)

    def record_blocks(self, ids: Integers) -> None:
        """Log whole blocks as written by the step; call between ``begin`` and ``end``.

        For engines that know what a step writes only after it has begun, or whose attention keeps
        the tokens of a block in an order of its own, so that a part of a block says nothing.

        Raises:
            InvalidArgumentError: a block is not below ``max_blocks``.
        """
        pool = self._stage.pool
        self._stage.tracker.record_blocks(self.stamp.seq, ids, pool.spec.block_size)


class Stage:
    """Held by a worker process of the engine, one per pipeline rank.

    The engine runs each step as ``begin``, then every layer of ``step.layers`` after its
    ``step.gate(layer)``, then ``end``, in one thread and in the order of the stamps. All else
    happens in threads of the stage's own.

    Args:
        pp_rank: this stage's rank, 0 to ``pp_size - 1``.
        pp_size: the number of stages at the start.
        pool: the stage's KV memory; it holds the layers of the placement.
        placement: the placement of the first step.
        hooks: what the engine does when its layers change.
        weights: the memory of the layers' weights; None where the engine loads them by itself.
        control: where the coordinator listens; None for a stage that never takes part in a
            reconfiguration.
        transport: how KV arrives: ``shm``, ``tcp``, ``p2p``, ``nccl``, or ``auto`` for the best of
            them that both ends can do.
        gate_timeout: seconds that a step waits for the KV of a gained layer.
        joins: whether the stage comes to a pipeline that runs already. It holds no layer, and takes
            the epoch and the capacity from its first stamp.
        marks_on_device: whether steps may leave it to their appends on a GPU to mark what they
            write, see :meth:`begin`; the pool lies on a GPU then.
        background_nice: how much nicer than the process the threads are that load weights and map
            memory, 0 to 19 (Linux). Of use where the steps compute on the same cores.
    """

    def __init__(
        self,
        *,
        pp_rank: int,
        pp_size: int,
        pool: KVPool,
        placement: Placement,
        hooks: EngineHooks | None = None,
        weights: LayerWeights | None = None,
        control: ControlEndpoint | None = None,
        transport: str = "auto",
        gate_timeout: float = GATE_TIMEOUT,
        joins: bool = False,
        marks_on_device: bool = False,
        background_nice: int = 0,
    ) -> None:
        if placement.num_stages != pp_size:
            raise InvalidArgumentError(
                f"pp_size is {pp_size}, but the placement {placement} has "
                f"{placement.num_stages} stages"
            )
        if placement.num_layers != pool.num_layers:
            raise InvalidArgumentError(
                f"the placement has {placement.num_layers} layers, the pool {pool.num_layers}"
            )
        if transport not in ("auto", "shm", "tcp", "p2p", "nccl"):
            raise InvalidArgumentError(
                f"transport is {transport!r}, expected auto, shm, tcp, p2p or nccl"
            )
        if not 0 <= background_nice <= 19:
            raise InvalidArgumentError(f"background_nice is {background_nice}, expected 0 to 19")
        if placement.layers_of(pp_rank) != tuple(pool.layers):
            raise InvalidArgumentError(
                f"stage {pp_rank} of placement {placement} holds layers "
                f"{placement.layers_of(pp_rank)}, the pool {tuple(pool.layers)}"
            )
        whole_stacks([placement], pool.stack)
        self.pp_rank = pp_rank
        self.pp_size = pp_size
        self.pool = pool
        self.weights = weights
        self.hooks = hooks if hooks is not None else EngineHooks()
        self.transport = transport
        self.tracker = DirtyTracker(
            pool.max_blocks * pool.spec.block_size,
            device=pool.page_pool.device if marks_on_device else None,
        )
        self.lock = threading.Condition()
        self.work = threading.Lock()
        """Held by whoever changes what the session holds, one request at a time."""
        self.background = Background(background_nice)
        self.kept = KeptLayers(pool, weights, self.hooks, self.background)
        self._placement = placement
        self._layers = placement.layers_of(pp_rank)
        self._epoch = -1 if joins else 0
        self._gate_timeout = gate_timeout
        self._last_seq = -1
        self._open: Step | None = None
        self._resize = 0
        self._session: StageSession | None = None
        self._state = STAGE.start
        self._given_up = -1
        self._last_switched: Switched | None = None
        self._last_end_ns = 0
        self._closed = False
        self._client: ControlClient | None = None
        if control is not None:
            service = StageService(self, control.key.patch_secret)
            self._client = ControlClient(control, f"stage/{pp_rank}", service.handle)

    # -- the engine's side -------------------------------------------------------------------------

    @property
    def placement(self) -> Placement:
        """The placement that the stage runs."""
        return self._placement

    @property
    def epoch(self) -> int:
        """The epoch of that placement."""
        return self._epoch

    @property
    def last_seq(self) -> int:
        """The last step that has ended, -1 at first."""
        return self._last_seq if self._open is None else self._last_seq - 1

    @property
    def resize(self) -> int:
        """The number of the last resize that was applied."""
        return self._resize

    def begin(self, stamp: Stamp, slots: Any = None, *, stream: Any = None) -> Step:
        """Begin a step.

        On a GPU the slots may stay there: with a ``stream`` instead of ``slots``, the appends that
        are given ``marks=stage.tracker`` in that stream mark what the step writes.

        Args:
            stamp: from the scheduler, the next one in order.
            slots: int64 [tokens], the slots that the step writes, -1 for none; None: not known to
                the host, or none.
            stream: of torch or cupy, or its handle; the step's appends go there.

        Raises:
            ProtocolError: the stamp is not the next one, or of an epoch the stage is not armed for.
            InvalidArgumentError: a slot is not below the capacity, or a stream is given to a stage
                without marks on the device.
            BusyError: more marked steps are in flight than the tracker keeps apart.
        """
        if self._closed:
            raise ClosedError(f"stage {self.pp_rank} is closed")
        if self._open is not None:
            raise ProtocolError(f"step {stamp.seq} begins before step {self._open.stamp.seq} ended")
        if stamp.seq != self._last_seq + 1 and self._last_seq >= 0:
            raise ProtocolError(
                f"stage {self.pp_rank} got step {stamp.seq}, expected {self._last_seq + 1}"
            )
        limit = min(stamp.capacity, self.pool.max_blocks) * self.pool.spec.block_size
        written = _checked_slots(slots, limit)
        if self._epoch < 0:
            self._join(stamp)
        elif stamp.resize != self._resize:
            self._apply_resize(stamp, stream)
        if stamp.epoch != self._epoch:
            self._activate(stamp)
        self.tracker.open(stamp.seq)
        if stream is not None:
            self.tracker.mark(stamp.seq, stream)
        if written is not None:
            self.tracker.record(stamp.seq, written)
        if stamp.moves:
            moved = [new for _, new in stamp.moves]
            self.tracker.record_blocks(stamp.seq, moved, self.pool.spec.block_size)
        self._last_seq = stamp.seq
        self._open = Step(stamp, self._layers, self)
        return self._open

    def gate(self, stamp: Stamp, layer: int) -> None:
        """See :meth:`Step.gate`."""
        session = self._session
        if session is not None and session.switch_step is not None:
            needs = stamp.seq - 1 if stamp.needs is None else stamp.needs
            session.gate(layer, needs, self._gate_timeout)

    def end(self, step: Step, *, stream: Any = None) -> None:
        """End a step: its writes are complete, and may be sent.

        On a GPU, with a ``stream``: they are once it has done what it was given so far.

        Raises:
            ProtocolError: the step is not the one that was begun last.
            InvalidArgumentError: a stream is given to a stage without marks on the device.
        """
        if self._open is not step:
            raise ProtocolError(f"step {step.stamp.seq} is not the one that was begun last")
        self.tracker.seal(step.stamp.seq, stream=stream)
        self._last_end_ns = time.monotonic_ns()
        self._open = None
        with self.lock:
            if self._session is not None:
                self._session.step_ended(step.stamp.seq)
            self.lock.notify_all()

    def close(self) -> None:
        """Give up what is under way and leave the control plane. May be called twice."""
        self._closed = True
        with self.lock:
            session = self._session
            undecided = session is not None and session.switch_step is None
        if session is not None and undecided:
            session.interrupt()
            # A hook that does not return keeps no more than its own thread waiting.
            if self.work.acquire(timeout=JOIN_TIMEOUT):
                try:
                    session.discard()
                finally:
                    self.work.release()
        if self._client is not None:
            self._client.close()
        with self.lock:
            self.lock.notify_all()

    # -- between steps, in the engine's thread -----------------------------------------------------

    def _join(self, stamp: Stamp) -> None:
        """What others have learned step by step, before this stage was there."""
        if self._layers:
            raise ProtocolError(
                f"stage {self.pp_rank} joins with layers {self._layers}, expected none"
            )
        if stamp.capacity > self.pool.capacity:
            self.pool.grow(stamp.capacity)
        elif stamp.capacity < self.pool.capacity:
            self.pool.shrink(stamp.capacity)
        self.tracker.reset(stamp.seq)
        with self.lock:
            self._epoch = stamp.epoch
            self._resize = stamp.resize
            self.fence(stamp.aborted)
            self.lock.notify_all()

    def _apply_resize(self, stamp: Stamp, stream: Any) -> None:
        if stamp.resize != self._resize + 1:
            raise ProtocolError(
                f"stage {self.pp_rank} got resize {stamp.resize}, expected {self._resize + 1}"
            )
        moves = dict(stamp.moves)
        # The pages go when the coordinator asks whether this was done, beside the steps.
        self.pool.shrink(stamp.capacity, live=moves, moves=moves, stream=stream, reclaim=False)
        with self.lock:
            self._resize = stamp.resize
            self.lock.notify_all()

    def _activate(self, stamp: Stamp) -> None:
        start = time.monotonic_ns()
        with self.lock:
            session = self._session
            try:
                # Others are told at the end: woken now, they would take the interpreter from this.
                self._state = self.check(STAMP_K, stamp.epoch)
            except ProtocolError as error:
                raise ProtocolError(
                    f"step {stamp.seq} is of epoch {stamp.epoch}, for which stage {self.pp_rank} "
                    f"is not armed; it runs epoch {self._epoch}: {error}"
                ) from None
            if session is None:
                raise ProtocolError(f"stage {self.pp_rank} has no session to switch")
        self.hooks.activate(session.placement)
        with self.lock:
            self._placement = session.placement
            self._layers = session.placement.layers_of(self.pp_rank)
            self._epoch = stamp.epoch
            session.switch(stamp.seq)
            session.switched(self._last_end_ns, start)
            self.lock.notify_all()

    # -- for the service ---------------------------------------------------------------------------

    @property
    def session(self) -> StageSession | None:
        """The reconfiguration under way."""
        return self._session

    @property
    def state(self) -> StageState:
        """Where the stage stands in the protocol."""
        return self._state

    @property
    def given_up(self) -> int:
        """The highest epoch that the stage refuses, since it was given up."""
        return self._given_up

    @property
    def last_switched(self) -> Switched | None:
        """What the last switchover cost, once its session has ended."""
        return self._last_switched

    def age(self, epoch: int | None) -> Age:
        """How ``epoch`` stands to what the stage takes part in and runs."""
        session = self._session.epoch if self._session is not None else None
        return age_of(epoch, session=session, running=self._epoch, given_up=self._given_up)

    def check(self, event: str, epoch: int | None = None) -> StageState:
        """The state that ``event`` leads to; raises ProtocolError where it is not allowed."""
        with self.lock:
            return STAGE.next(self._state, event, self.age(epoch), f"stage {self.pp_rank}")

    def take(self, event: str, epoch: int | None = None) -> StageState:
        """Move on as the table says, to the state returned; raises as :meth:`check` does."""
        with self.lock:
            self._state = self.check(event, epoch)
            self.lock.notify_all()
            return self._state

    def open_session(self, session: StageSession) -> None:
        """Take part in a reconfiguration; there is no other one."""
        with self.lock:
            if self._closed:
                raise ClosedError(f"stage {self.pp_rank} is closed")
            self.take("Prepare", session.epoch)
            self._session = session
            session.step_ended(self.last_seq)

    def close_session(self, session: StageSession) -> None:
        """The session has released what was given away."""
        with self.lock:
            self.take("Release", session.epoch)
            self._last_switched = session.report()
            self._session = None

    def give_up(self, session: StageSession) -> None:
        """Everything as it was before ``session``; call with :attr:`work` held."""
        with self.lock:
            if self._session is not session:
                return
            if self._state is not StageState.ABORTING:
                self.take("Abort", session.epoch)
        session.discard()
        with self.lock:
            self.take(DISCARDED, session.epoch)
            self.fence(session.epoch)
            self._session = None

    def fence(self, epoch: int) -> None:
        """Refuse ``epoch`` and all before it from now on."""
        with self.lock:
            self._given_up = max(self._given_up, epoch)

    def wait_until(self, ready: Callable[[], bool], timeout: float, what: str) -> None:
        """Wait until ``ready()`` holds; it is called again after each step and resize."""
        end = time.monotonic() + timeout
        with self.lock:
            while not ready():
                rest = end - time.monotonic()
                if self._closed:
                    raise ClosedError(f"stage {self.pp_rank} is closed")
                if rest <= 0:
                    raise DeadlineError(
                        f"stage {self.pp_rank} waited {timeout:.1f} s for {what}; its last step is "
                        f"{self._last_seq}"
                    )
                self.lock.wait(rest)


def _checked_slots(slots: Any, limit: int) -> Slots | None:
    if slots is None:
        return None
    found = np.from_dlpack(slots) if not isinstance(slots, np.ndarray | list | tuple) else slots
    array = np.asarray(found)
    if array.size == 0:
        return None
    if array.dtype != np.int64 or array.ndim != 1:
        raise InvalidArgumentError(
            f"slots has dtype {array.dtype} and {array.ndim} dimensions, expected int64 [tokens]"
        )
    if int(array.max()) >= limit or int(array.min()) < -1:
        raise InvalidArgumentError(
            f"slots reach from {array.min()} to {array.max()}, expected -1 to {limit - 1}"
        )
    return array

"""How a stage answers the coordinator; every method runs in a thread of the control plane."""

from __future__ import annotations

import dataclasses
import functools
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from pipelive_kv.errors import DeadlineError, ProtocolError
from pipelive_kv.messages import (
    Abort,
    Admit,
    Admitted,
    Answer,
    Arm,
    AwaitConverged,
    AwaitResize,
    AwaitStep,
    AwaitSwitched,
    Commit,
    Connect,
    Converged,
    Describe,
    Done,
    Grow,
    LoadWeights,
    Observe,
    Prepare,
    Prepared,
    Progress,
    Release,
    Request,
    StageInfo,
    StartCopy,
    Switched,
    WriteThrough,
)
from pipelive_kv.migration import PatchReceiver, PatchSender
from pipelive_kv.placement import Placement, whole_stacks
from pipelive_kv.stage.hooks import in_pool
from pipelive_kv.stage.incoming import Incoming
from pipelive_kv.stage.outgoing import Outgoing
from pipelive_kv.stage.session import StageSession
from pipelive_kv.stage.source import SourceSession
from pipelive_kv.stage.target import TargetSession
from pipelive_kv.transport import Channel, PatchListener, connect

if TYPE_CHECKING:
    from pipelive_kv.stage.stage import Stage


class StageService:
    """Carries out the coordinator's requests on one stage."""

    def __init__(self, stage: Stage, patch_secret: bytes) -> None:
        self._stage = stage
        self._key = patch_secret

    def handle(self, request: Request) -> Answer:
        """Answer one request, where the protocol's table allows it in the stage's state."""
        match request:
            case Describe():
                return self._describe()
            case Observe():
                return self._observe()
            case AwaitResize():
                self._await_resize(request.resize, request.timeout)
                self._stage.background.run(self._stage.pool.reclaim)
                return Done()
            case AwaitStep():
                self._stage.wait_until(
                    lambda: self._stage.last_seq >= request.seq,
                    request.timeout,
                    f"step {request.seq} to end",
                )
                return Done()
            case AwaitConverged():
                return self._await_converged(request)
            case AwaitSwitched():
                return self._await_switched(request)
            case Commit():
                return self._commit(request)
            case Abort():
                return self._abort(request)
            case Admit():
                self._stage.check("Admit", request.epoch)
                return self._admit(request)
            case Prepare():
                with self._working(request.timeout):
                    return self._prepare(request)
            case Connect():
                with self._working(request.timeout):
                    return self._connect(request)
            case StartCopy():
                with self._working(request.timeout):
                    return self._start_copy(request)
            case LoadWeights():
                with self._working(request.timeout):
                    return self._load(request)
            case WriteThrough():
                with self._working(request.timeout):
                    return self._write_through(request)
            case Arm():
                with self._working(request.timeout):
                    return self._arm(request)
            case Release():
                with self._working(request.timeout):
                    return self._release(request)
            case Grow():
                self._await_resize(request.resize, request.timeout)
                with self._working(request.timeout):
                    self._stage.check("Grow")
                    if request.capacity > self._stage.pool.capacity:
                        grow = functools.partial(self._stage.pool.grow, request.capacity)
                        self._stage.background.run(grow)
                return Done()
            case _:
                raise ProtocolError(f"a stage does not answer {type(request).__name__}")

    @contextmanager
    def _working(self, timeout: float) -> Iterator[None]:
        """One request at a time changes what the session holds; an abort waits for its end."""
        if not self._stage.work.acquire(timeout=max(0.0, timeout)):
            raise DeadlineError(
                f"stage {self._stage.pp_rank} was busy with another request for {timeout:.1f} s"
            )
        try:
            yield
        finally:
            self._stage.work.release()

    def _session(self, event: str, epoch: int) -> StageSession:
        """The session of ``epoch``, in a state that takes ``event``."""
        with self._stage.lock:
            self._stage.check(event, epoch)
            session = self._stage.session
        if session is None or session.epoch != epoch:
            raise ProtocolError(f"stage {self._stage.pp_rank} takes no part in epoch {epoch}")
        return session

    def _await_resize(self, resize: int, timeout: float) -> None:
        self._stage.wait_until(
            lambda: self._stage.resize >= resize, timeout, f"the step that carries resize {resize}"
        )

    def _describe(self) -> StageInfo:
        stage = self._stage
        pool, stats = stage.pool, stage.pool.page_pool.stats()
        with stage.lock:
            session, state = stage.session, stage.state
        return StageInfo(
            rank=stage.pp_rank,
            epoch=stage.epoch,
            stages=stage.placement.stages,
            layers=tuple(sorted(set(pool.layers) - set(stage.kept.layers))),
            capacity=pool.capacity,
            max_blocks=pool.max_blocks,
            budget_bytes=stats.budget_bytes,
            used_bytes=stats.used_bytes,
            peak_bytes=stats.peak_held_bytes,
            spec=dataclasses.asdict(pool.spec) | {"num_layers": pool.num_layers},
            layer_bytes=tuple(self._layer_bytes(layer) for layer in range(pool.num_layers)),
            stack=pool.stack,
            process=os.getpid(),
            last_seq=stage.last_seq,
            state=state.value,
            given_up=stage.given_up,
            session=session.epoch if session is not None else -1,
            session_stages=session.placement.stages if session is not None else (),
            session_from=session.old.stages if session is not None else (),
            other_bytes=self._other_bytes(stats.used_bytes),
            block_bytes=pool.spec.block_bytes,
            page_bytes=pool.page_pool.page_bytes,
        )

    def _observe(self) -> Progress:
        stage = self._stage
        session, stats = stage.session, stage.pool.page_pool.stats()
        source = session.source if session is not None else None
        return Progress(
            rank=stage.pp_rank,
            epoch=stage.epoch,
            seq=stage.last_seq,
            rounds=len(source.rounds) if source is not None else 0,
            bytes_sent=source.bytes_sent if source is not None else 0,
            lag_steps=source.lag_steps if source is not None else 0,
            used_bytes=stats.used_bytes,
            held_bytes=stats.held_bytes,
            peak_bytes=stats.peak_held_bytes,
            capacity=stage.pool.capacity,
        )

    def _layer_bytes(self, layer: int) -> int:
        weights = self._stage.weights
        return weights.layer_bytes(layer) if weights is not None else 0

    def _admit(self, request: Admit) -> Admitted:
        """The budget rule: what the union's weights leave of the budget holds its blocks."""
        stage = self._stage
        target = Placement(request.stages)
        whole_stacks([target], stage.pool.stack)
        stats = stage.pool.page_pool.stats()
        others = self._other_bytes(stats.used_bytes)
        fits, reasons = [], []
        union = stage.placement.union_with(target, stage.pp_rank)
        for layers in (union, target.layers_of(stage.pp_rank)):
            weights = sum(self._layer_bytes(layer) for layer in layers)
            room = stats.budget_bytes - others - weights
            count = stage.pool.max_blocks
            if layers:
                count = min(count, stage.pool.blocks_that_fit(layers, max(room, 0)))
            fits.append(count)
            if count < 1:
                reasons.append(
                    f"stage {stage.pp_rank} lacks "
                    f"{stage.pool.bytes_needed(layers, 1) - room} bytes for the weights and one "
                    f"block of {len(layers)} layers in its budget of {stats.budget_bytes} bytes"
                )
        return Admitted(fits[0], fits[1], "; ".join(reasons))

    def _other_bytes(self, used_bytes: int) -> int:
        """What neither the layers that the stage runs nor those that it gains take."""
        stage = self._stage
        session = stage.session
        gained = session.target.layers if session is not None else ()
        own = stage.placement.layers_of(stage.pp_rank)
        held = {*own, *gained, *stage.kept.layers} & set(stage.pool.layers)
        return max(0, used_bytes - self._own_bytes(tuple(sorted(held))))

    def _own_bytes(self, layers: tuple[int, ...]) -> int:
        pool = self._stage.pool
        # Weights that do not lie in the pool's pages are in the budget, but not in what is used.
        inside = in_pool(self._stage.weights)
        weights = sum(self._layer_bytes(layer) for layer in layers) if inside else 0
        return weights + (pool.bytes_needed(layers, pool.capacity) if layers else 0)

    def _prepare(self, request: Prepare) -> Prepared:
        stage = self._stage
        stage.check("Prepare", request.epoch)
        placement = Placement(request.stages)
        gained = tuple(layer for _, layers in request.incoming for layer in layers)
        if not request.resume:
            stage.kept.drop()
        held = set(stage.pool.layers) - set(stage.kept.layers)
        expected = set(placement.layers_of(stage.pp_rank)) - held
        if request.resume and expected != set(stage.kept.layers):
            raise ProtocolError(
                f"stage {stage.pp_rank} is told to take layers {sorted(gained)} up again, it has "
                f"kept {stage.kept.layers}"
            )
        if set(gained) != expected or len(gained) != len(expected):
            raise ProtocolError(
                f"stage {stage.pp_rank} is told to take layers {sorted(gained)}, expected "
                f"{sorted(expected)}"
            )
        ends_at = time.monotonic() + request.timeout
        target = TargetSession(
            request.epoch,
            tuple(sorted(gained)),
            stage.pool,
            stage.weights,
            stage.hooks,
            stage.background,
            weights_from=request.weights,
            verify=request.verify,
            ends_at=ends_at,
            kept=request.resume,
        )
        session = StageSession(
            request.epoch, stage.pp_rank, stage.placement, placement, target, lease=request.lease
        )
        stage.open_session(session)
        try:
            stage.kept.take()
            target.make_room()
            for source, layers in request.incoming:
                target.listen(self._listen(request.epoch, source, layers, target, ends_at))
        except BaseException:
            stage.give_up(session)
            raise
        return Prepared(tuple(incoming.address for incoming in target.incoming))

    def _listen(
        self,
        epoch: int,
        source: int,
        layers: tuple[int, ...],
        target: TargetSession,
        ends_at: float,
    ) -> Incoming:
        stage = self._stage
        views = {layer: stage.pool.layer(layer) for layer in layers}
        regions = target.regions(layers)

        def make_receiver(channel: Channel) -> PatchReceiver:
            return PatchReceiver(channel, stage.pool.spec, views, epoch=epoch, regions=regions)

        listener = PatchListener(
            stage.transport,
            key=self._key,
            hello=self._hello(epoch),
            device=stage.pool.page_pool.device,
        )
        return Incoming(source, layers, listener, make_receiver, stage.background, ends_at)

    def _hello(self, epoch: int) -> dict[str, str | int | bool]:
        """What both ends of a move must agree on; the order of a block in memory may differ."""
        pool = self._stage.pool
        return {
            "epoch": epoch,
            "num_layers": pool.num_layers,
            "num_kv_heads": pool.spec.num_kv_heads,
            "head_dim": pool.spec.head_dim,
            "dtype": pool.spec.dtype,
            "block_size": pool.spec.block_size,
        }

    def _connect(self, request: Connect) -> Done:
        stage = self._stage
        session = self._session("Connect", request.epoch)
        outgoing: list[Outgoing] = []
        ends_at = time.monotonic() + request.timeout
        try:
            for target, layers, address in request.outgoing:
                move = self._outgoing(request, target, layers, address)
                move.open(request.timeout)
                outgoing.append(move)
            if outgoing:
                source = SourceSession(
                    request.epoch,
                    stage.tracker,
                    outgoing,
                    stage.background,
                    sealed=stage.last_seq,
                    block_size=stage.pool.spec.block_size,
                    verify=request.verify,
                    ends_at=ends_at,
                    resume=request.resume,
                )
            else:
                source = None
            with stage.lock:
                stage.take("Connect", request.epoch)
                session.source = source
                if source is not None:
                    source.sealed(session.last_ended)
        except BaseException:
            for move in outgoing:
                move.sender.cancel()
            raise
        return Done()

    def _outgoing(
        self, request: Connect, target: int, layers: tuple[int, ...], address: str
    ) -> Outgoing:
        pool = self._stage.pool
        views = {layer: pool.layer(layer) for layer in layers}

        def open_channel(timeout: float, again: bool = False) -> Channel:
            return connect(
                address,
                key=self._key,
                timeout=timeout,
                hello=self._hello(request.epoch),
                device=pool.page_pool.device,
                again=again,
            )

        def make_sender(channel: Channel) -> PatchSender:
            return PatchSender(
                channel,
                pool.spec,
                views,
                epoch=request.epoch,
                rate_limit=request.rate_limit or None,
            )

        again = functools.partial(open_channel, again=True)
        return Outgoing(target, layers, open_channel, make_sender, again)

    def _start_copy(self, request: StartCopy) -> Done:
        session = self._session("StartCopy", request.epoch)
        source = session.source
        if source is None:
            self._stage.take("StartCopy", request.epoch)
            return Done()
        weights = self._stage.weights
        send_weights = None
        if session.target.weights_from == "peer" and weights is not None:
            arena = weights

            def send_weights(move: Outgoing) -> None:
                for layer in move.layers:
                    move.sender.send_region(layer, arena.outgoing(layer), timeout=request.timeout)

        self._stage.take("StartCopy", request.epoch)
        source.start(
            request.live,
            max_stop_ms=request.max_stop_ms,
            max_rounds=request.max_rounds,
            weights=send_weights,
        )
        return Done()

    def _await_converged(self, request: AwaitConverged) -> Converged:
        source = self._session("AwaitConverged", request.epoch).source
        if source is None:
            return Converged(0.0, 0, 0)
        return source.await_converged(request.timeout)

    def _load(self, request: LoadWeights) -> Done:
        self._session("LoadWeights", request.epoch).target.load(request.timeout)
        self._stage.take("LoadWeights", request.epoch)
        return Done()

    def _write_through(self, request: WriteThrough) -> Done:
        source = self._session("WriteThrough", request.epoch).source
        if source is not None:
            source.write_through(request.timeout)
        self._stage.take("WriteThrough", request.epoch)
        return Done()

    def _arm(self, request: Arm) -> Done:
        session = self._session("Arm", request.epoch)
        self._stage.hooks.warmup(session.placement)
        if session.lease and session.source is None:
            # Nobody else reads this log, and what is in it so far is on both stages.
            self._stage.tracker.collect()
        with self._stage.lock:
            self._stage.check("Arm", request.epoch)
            session.arm()
            self._stage.take("Arm", request.epoch)
        return Done()

    def _commit(self, request: Commit) -> Done:
        with self._stage.lock:
            self._stage.take("Commit", request.epoch)
            session = self._stage.session
            if session is not None:
                session.commit(request.step)
        return Done()

    def _await_switched(self, request: AwaitSwitched) -> Switched:
        end = time.monotonic() + request.timeout
        stage = self._stage
        with stage.lock:
            stage.check("AwaitSwitched", request.epoch)
            session = stage.session
            if session is None:
                if stage.last_switched is None:
                    raise ProtocolError(f"stage {stage.pp_rank} never had a session")
                return stage.last_switched
        stage.wait_until(
            lambda: session.switch_step is not None and session.last_ended >= session.switch_step,
            request.timeout,
            f"the first step of epoch {request.epoch}",
        )
        if session.source is not None:
            session.source.await_tail(max(0.0, end - time.monotonic()))
        session.target.finish(max(0.0, end - time.monotonic()))
        return session.report()

    def _release(self, request: Release) -> Done:
        stage = self._stage
        with stage.lock:
            stage.check("Release", request.epoch)
            session = stage.session
        if session is None:
            if not request.keep:
                stage.kept.drop()
            return Done()
        if session.source is not None:
            session.source.await_tail(request.timeout)
        session.target.finish(request.timeout)
        if request.keep:
            stage.kept.keep(session.lost)
        else:
            stage.kept.give_back(session.lost)
        stage.close_session(session)
        return Done()

    def _abort(self, request: Abort) -> Done:
        stage = self._stage
        with stage.lock:
            stage.take("Abort", request.epoch)
            session = stage.session
            if session is None or session.epoch != request.epoch:
                stage.fence(request.epoch)
                session = None
        if session is None:
            if stage.kept.layers:
                with self._working(request.timeout):
                    stage.kept.drop()
            return Done()
        session.interrupt()
        with self._working(request.timeout):
            stage.give_up(session)
        return Done()

"""The taking side of a move: room for layers, their weights, their KV, and the gate."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from pipelive_kv.errors import CancelledError, DeadlineError, PipeliveError
from pipelive_kv.kv import KVPool
from pipelive_kv.migration import PatchReceiver
from pipelive_kv.stage.hooks import EngineHooks, LayerWeights
from pipelive_kv.stage.limits import JOIN_TIMEOUT, SESSION_TIMEOUT
from pipelive_kv.transport import Channel, PatchListener


class Incoming:
    """The layers that come from one source: its connection, and the thread that applies patches."""

    def __init__(
        self,
        source: int,
        layers: tuple[int, ...],
        listener: PatchListener,
        make_receiver: Callable[[Channel], PatchReceiver],
        ends_at: float,
    ) -> None:
        self.source = source
        self.layers = layers
        self._listener = listener
        self._make_receiver = make_receiver
        self._ends_at = ends_at
        self._lock = threading.Condition()
        self._receiver: PatchReceiver | None = None
        self._error: PipeliveError | None = None
        self._finished = False
        self._cancelled = False
        self._open_through = -1  # what the engine's thread has found applied
        self._thread = threading.Thread(
            target=self._run, name=f"pipelive-apply-from-{source}", daemon=True
        )
        self._thread.start()

    @property
    def address(self) -> str:
        """Where the source connects."""
        return self._listener.address

    def receiver(self, timeout: float) -> PatchReceiver:
        """The receiver, once the source has connected; raises what the thread raised."""
        end = time.monotonic() + timeout
        with self._lock:
            while self._receiver is None:
                self._check_locked()
                rest = end - time.monotonic()
                if rest <= 0:
                    raise DeadlineError(
                        f"stage {self.source} did not connect within {timeout:.1f} s"
                    )
                self._lock.wait(rest)
            return self._receiver

    def wait_applied(self, seq: int, timeout: float) -> None:
        """The gate: wait until all writes of steps up to ``seq`` are applied."""
        if seq > self._open_through:
            self.receiver(timeout).wait_applied(seq, timeout=timeout)
            self._open_through = seq

    def wait_finished(self, timeout: float) -> None:
        """Wait until the source has said that it is done (and verified, if it verifies)."""
        end = time.monotonic() + timeout
        with self._lock:
            while not self._finished:
                self._check_locked()
                rest = end - time.monotonic()
                if rest <= 0:
                    raise DeadlineError(
                        f"stage {self.source} did not finish its patches within {timeout:.1f} s"
                    )
                self._lock.wait(rest)

    def check(self) -> None:
        """Raise what the thread raised, if it did."""
        with self._lock:
            self._check_locked()

    def interrupt(self) -> None:
        """Let the thread end, without waiting for it. May be called twice."""
        with self._lock:
            self._cancelled = True
            receiver = self._receiver
            self._lock.notify_all()
        self._listener.close()
        if receiver is not None:
            receiver.cancel()

    def cancel(self) -> None:
        """Nothing is written any more when this has returned. May be called twice."""
        self.interrupt()
        self._thread.join(timeout=JOIN_TIMEOUT)

    def _check_locked(self) -> None:
        if self._error is not None:
            raise self._error
        if self._cancelled:
            raise CancelledError(f"the move from stage {self.source} was cancelled")

    def _run(self) -> None:
        channel = None
        try:
            channel = self._listener.accept(timeout=max(0.0, self._ends_at - time.monotonic()))
            receiver = self._make_receiver(channel)
            with self._lock:
                if self._cancelled:
                    receiver.cancel()
                    return
                self._receiver = receiver
                self._lock.notify_all()
            receiver.run(timeout=SESSION_TIMEOUT)
            with self._lock:
                self._finished = True
                self._lock.notify_all()
        except PipeliveError as error:
            self._end(error)
        except Exception as error:  # a defect of ours must not leave the others waiting
            self._end(PipeliveError(f"apply thread: {type(error).__name__}: {error}"))
        finally:
            self._listener.close()
            if channel is not None:
                channel.close()

    def _end(self, error: PipeliveError) -> None:
        with self._lock:
            if self._error is None:
                self._error = error
            self._lock.notify_all()


class TargetSession:
    """Everything a stage holds for the layers it gains, until they are its own or discarded."""

    def __init__(
        self,
        epoch: int,
        layers: tuple[int, ...],
        pool: KVPool,
        weights: LayerWeights | None,
        hooks: EngineHooks,
        *,
        weights_from: str,
        verify: bool,
        ends_at: float,
        kept: bool = False,
    ) -> None:
        """With ``kept``, the stage has the layers, built and loaded; see `KeptLayers`."""
        self.epoch = epoch
        self.layers = layers
        self._kept = kept
        self.weights_from = weights_from
        self._pool = pool
        self._weights = weights
        self._hooks = hooks
        self._verify = verify
        self._ends_at = ends_at
        self.incoming: list[Incoming] = []
        self._source_of: dict[int, Incoming] = {}
        self._kv_added = False
        self._weights_added: list[int] = []
        self._prepared = False
        self.loaded = False

    def make_room(self) -> None:
        """Map KV and weights for the gained layers; on failure nothing stays mapped."""
        if self._kept:
            self._weights_added = list(self.layers) if self._weights is not None else []
            self._kv_added = self._prepared = bool(self.layers)
            return
        try:
            if self._weights is not None:
                for layer in self.layers:
                    self._weights.add(layer)
                    self._weights_added.append(layer)
            if self.layers:
                self._pool.add_layers(self.layers)
                self._kv_added = True
        except BaseException:
            self.discard()
            raise

    def listen(self, incoming: Incoming) -> None:
        """Take over the connection that one source's layers come through."""
        self.incoming.append(incoming)
        for layer in incoming.layers:
            self._source_of[layer] = incoming

    def regions(self, layers: Sequence[int]) -> Mapping[int, Any]:
        """Where weights from the source stage land, per layer; empty if they come otherwise."""
        if self.weights_from != "peer" or self._weights is None or self._kept:
            return {}
        return {layer: self._weights.region(layer) for layer in layers}

    def load(self, timeout: float) -> None:
        """Fill the weights and let the engine prepare the layers."""
        if self._kept:
            self.loaded = True
            return
        if self._weights is not None and self.weights_from == "source":
            # Reading a file and copying from it overlap when two layers are under way.
            with ThreadPoolExecutor(2, thread_name_prefix="pipelive-load") as pool:
                for done in [pool.submit(self._weights.load, layer) for layer in self.layers]:
                    done.result(timeout=timeout)
        elif self._weights is not None:
            for layer in self.layers:
                receiver = self._source_of[layer].receiver(timeout)
                receiver.wait_region(layer, timeout=timeout)
                self._weights.landed(layer)
        if self.layers:
            self._prepared = True
            self._hooks.prepare(self.layers, self._weights)
        self.loaded = True

    def check(self) -> None:
        """Raise what went wrong with a connection, if something did."""
        for incoming in self.incoming:
            incoming.check()

    def gate(self, layer: int, through: int, timeout: float) -> None:
        """Wait until ``layer`` holds all writes of the steps up to ``through``."""
        incoming = self._source_of.get(layer)
        if incoming is None:
            return
        incoming.wait_applied(through, timeout)
        if self._verify:
            incoming.wait_finished(timeout)

    def finish(self, timeout: float) -> None:
        """Wait until every source has ended its transfer; the layers are the stage's own now."""
        for incoming in self.incoming:
            incoming.wait_finished(timeout)

    def interrupt(self) -> None:
        """End what waits for a source, without waiting for the end."""
        for incoming in tuple(self.incoming):
            incoming.interrupt()

    def discard(self) -> None:
        """Cancel the transfers and give everything back that was gained."""
        for incoming in self.incoming:
            incoming.cancel()
        self.incoming.clear()
        self._source_of.clear()
        if self._prepared:
            self._prepared = False
            (self._hooks.retire if self._kept else self._hooks.discard)(self.layers)
        if self._kv_added:
            self._kv_added = False
            self._pool.drop_layers(self.layers)
        while self._weights_added and self._weights is not None:
            self._weights.drop(self._weights_added.pop())

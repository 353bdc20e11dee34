"""The stage processes: started, watched and always reaped."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import queue
import shutil
import signal
import stat
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Iterable
from multiprocessing.process import BaseProcess
from typing import Any

import msgspec
import zmq

from pipelive_kv.engines.reference.config import EngineFailedError
from pipelive_kv.engines.reference.messages import (
    Failed,
    FromStage,
    Meet,
    Met,
    Ready,
    Step,
    StepDone,
    Stop,
)
from pipelive_kv.engines.reference.worker import Launch, main, results_address, steps_address

__all__ = ["StageProcesses", "private_folder"]

_SEND_SECONDS = 30.0  # how long a stage may take nothing of what it is sent
_GRACE = 0.5  # seconds in which other stages may still say what they saw of a failure


def private_folder() -> str:
    """Make a folder that only this user can enter, short enough for socket paths."""
    path = tempfile.mkdtemp(prefix="pipelive-")
    os.chmod(path, stat.S_IRWXU)
    return path


class StageProcesses:
    """One process per stage, a socket to each, and a thread that listens to them all.

    The thread is there so that results are taken in (and steps retired) also while the driver waits
    for a stamp.

    Args:
        launches: one per stage that is there from the start, by rank.
        on_done: called in the listening thread with every result and the time it came in.
        on_lost: called there with the rank of a process that has ended and was not told to; returns
            whether the others can go on without it.
    """

    def __init__(
        self,
        launches: list[Launch],
        on_done: Callable[[StepDone, float], None],
        on_lost: Callable[[int], bool],
    ) -> None:
        self._on_done = on_done
        self._on_lost = on_lost
        self._events: queue.SimpleQueue[Ready | Met | EngineFailedError] = queue.SimpleQueue()
        self._context = zmq.Context()
        self._encoder = msgspec.msgpack.Encoder()
        self._directory = launches[0].directory
        self._results = self._context.socket(zmq.PULL)
        self._results.bind(results_address(self._directory))
        self._start_method = launches[0].config.start_method
        # Guards what is known of the processes, and their sockets, which several threads send on.
        self._lock = threading.RLock()
        self._steps: dict[int, zmq.Socket[bytes]] = {}
        self._processes: dict[int, BaseProcess] = {}
        self._started: list[BaseProcess] = []
        self._stopping = threading.Event()
        self._failure: EngineFailedError | None = None
        self._complaints: list[Failed] = []
        # Also when the engine is dropped without being closed, no process stays behind.
        self._reap = weakref.finalize(self, _reap, self._started, self._directory)
        try:
            for launch in launches:
                self._start(launch)
        except BaseException:
            self._reap()
            raise
        self._thread = threading.Thread(target=self._listen, name="pipelive-results", daemon=True)
        self._thread.start()

    @property
    def pids(self) -> tuple[int, ...]:
        """Process ids, by rank."""
        with self._lock:
            return tuple(process.pid or 0 for _, process in sorted(self._processes.items()))

    def start(self, launch: Launch) -> None:
        """Start the process of a stage that joins."""
        self.check()
        while not self._events.empty():  # of one that has gone before
            self._events.get()
        self._start(launch)

    def _start(self, launch: Launch) -> None:
        socket = self._context.socket(zmq.PUSH)
        socket.bind(steps_address(self._directory, launch.rank))
        process = _start_context(self._start_method).Process(
            target=main, args=(launch,), name=f"pipelive-stage-{launch.rank}", daemon=True
        )
        process.start()
        with self._lock:
            self._steps[launch.rank] = socket
            self._processes[launch.rank] = process
            self._started.append(process)

    def await_ready(self, ranks: Iterable[int], timeout: float) -> None:
        """Wait until every stage of `ranks` has loaded its layers.

        Raises:
            EngineFailedError: if one of them failed, or is not ready in time; named by rank.
        """
        self._await(ranks, timeout, lambda event: isinstance(event, Ready), "ready")

    def meet(self, meet: Meet, timeout: float) -> None:
        """Have the stages of a new group connect with each other, while steps go on.

        Raises:
            EngineFailedError: if one of them failed, or is not connected in time; named by rank.
        """
        self._send(self._encoder.encode(meet), meet.ranks)

        def is_met(event: Ready | Met) -> bool:
            if isinstance(event, Met) and event.group == meet.group and event.error:
                raise EngineFailedError(f"stage {event.rank} cannot connect: {event.error}")
            return isinstance(event, Met) and event.group == meet.group

        self._await(meet.ranks, timeout, is_met, "connected")

    def send(self, step: Step, ranks: Iterable[int]) -> None:
        """Send a step to every stage of `ranks`."""
        self.check()
        self._send(self._encoder.encode(step), ranks)

    def stop(self, rank: int, timeout: float = 5.0) -> None:
        """End the process of a stage, by force where it does not in time; it may have gone."""
        with self._lock:
            process, socket = self._processes.pop(rank, None), self._steps.pop(rank, None)
        if process is None or socket is None:
            return
        with contextlib.suppress(zmq.ZMQError):
            socket.send(self._encoder.encode(Stop()), zmq.NOBLOCK)
        process.join(timeout)
        if process.is_alive():
            process.kill()
            process.join(timeout)
        socket.close(linger=0)

    def check(self) -> None:
        """Raise the failure of a stage, if there was one."""
        if self._failure is not None:
            raise self._failure

    @property
    def failed(self) -> bool:
        """Whether a stage has failed."""
        return self._failure is not None

    def close(self, timeout: float = 5.0) -> None:
        """Stop the stages, by force where they do not in time. May be called twice."""
        if self._stopping.is_set():
            return
        self._stopping.set()
        encoded = self._encoder.encode(Stop())
        with self._lock:
            for socket in self._steps.values():
                with contextlib.suppress(zmq.ZMQError):
                    socket.send(encoded, zmq.NOBLOCK)
        end = time.monotonic() + (0.2 if self._failure is not None else timeout)
        for process in tuple(self._processes.values()):
            process.join(max(0.0, end - time.monotonic()))
        self._thread.join(timeout=5.0)
        self._reap()
        for socket in (*self._steps.values(), self._results):
            socket.close(linger=0)
        self._context.term()

    def _send(self, encoded: bytes, ranks: Iterable[int]) -> None:
        for rank in ranks:
            end = time.monotonic() + _SEND_SECONDS
            while not self._try_send(encoded, rank):
                self.check()
                if time.monotonic() >= end:
                    raise EngineFailedError(f"stage {rank} took nothing for {_SEND_SECONDS:.0f} s")
                self._stopping.wait(0.001)

    def _try_send(self, encoded: bytes, rank: int) -> bool:
        """Whether it was sent, or need not be, since the stage has gone.

        Nobody takes what is sent to a process that has just died. The listening thread notices its
        end, and needs the lock for that, so nothing blocks with the lock held.
        """
        with self._lock:
            if rank not in self._steps:
                return True
            try:
                self._steps[rank].send(encoded, zmq.NOBLOCK)
            except zmq.Again:
                return False
        return True

    def _await(
        self,
        ranks: Iterable[int],
        timeout: float,
        wanted: Callable[[Ready | Met], bool],
        what: str,
    ) -> None:
        end = time.monotonic() + timeout
        missing = set(ranks)
        while missing:
            try:
                event = self._events.get(timeout=max(0.0, end - time.monotonic()))
            except queue.Empty:
                raise EngineFailedError(
                    f"stages {sorted(missing)} were not {what} within {timeout:.0f} s"
                ) from None
            if isinstance(event, EngineFailedError):
                raise event
            if wanted(event):
                missing.discard(event.rank)

    # -- the listening thread ------------------------------------------------------------------

    def _listen(self) -> None:
        decoder = msgspec.msgpack.Decoder(FromStage)
        try:
            while not self._stopping.is_set():
                poller = zmq.Poller()
                poller.register(self._results, zmq.POLLIN)
                with self._lock:
                    sentinels = {p.sentinel: rank for rank, p in self._processes.items()}
                for sentinel in sentinels:
                    poller.register(sentinel, zmq.POLLIN)
                ready: dict[Any, int] = dict(poller.poll(200))
                if self._results in ready:
                    self._take(decoder.decode(self._results.recv()))
                    continue
                for sentinel in ready:
                    if not self._stopping.is_set() and self._ended(sentinels[sentinel], decoder):
                        return
        except Exception as error:
            self._fail(EngineFailedError(f"listening to the stages: {error}"))

    def _ended(self, rank: int, decoder: msgspec.msgpack.Decoder[FromStage]) -> bool:
        """A process has ended; whether that is the end of all."""
        with self._lock:
            if rank not in self._processes:
                return False  # it was told to
            socket = self._steps.pop(rank)
        # First, as whoever sends to it may hold what is waited for below.
        socket.close(linger=0)
        if not self._on_lost(rank):
            self._fail(self._collect(decoder))
            return True
        with self._lock:
            process = self._processes.pop(rank)
        said = [complaint for complaint in self._complaints if complaint.rank == rank]
        why = said[0].error if said else _exit(process.exitcode)
        # Whoever waits for it to join hears of it; for all others it goes unnoticed.
        self._events.put(EngineFailedError(f"stage {rank} has gone: {why}"))
        return False

    def _take(self, message: FromStage) -> None:
        if isinstance(message, StepDone):
            self._on_done(message, time.monotonic())
        elif isinstance(message, Ready | Met):
            self._events.put(message)
        # A Failed is followed by the end of its process, which is where it is reported.
        else:
            self._complaints.append(message)

    def _collect(self, decoder: msgspec.msgpack.Decoder[FromStage]) -> EngineFailedError:
        """Find out which stage failed first: the others fail too when their neighbour has gone."""
        said = self._complaints
        end = time.monotonic() + _GRACE
        while self._results.poll(max(0, int((end - time.monotonic()) * 1000))):
            message = decoder.decode(self._results.recv())
            if isinstance(message, Failed):
                said.append(message)
        texts: list[str] = []
        speakers = {message.rank for message in said}
        for rank, process in sorted(self._processes.items()):
            if not process.is_alive() and rank not in speakers:
                texts.append(f"stage {rank} died without a word: {_exit(process.exitcode)}")
        texts += [f"stage {message.rank} failed: {message.error}" for message in said]
        traces = "".join(f"\n\nstage {message.rank}:\n{message.trace}" for message in said)
        return EngineFailedError("; ".join(texts) + traces)

    def _fail(self, failure: EngineFailedError) -> None:
        self._failure = failure
        self._events.put(failure)


def _start_context(method: str) -> Any:
    context = multiprocessing.get_context(method)
    if method == "forkserver":
        # The server only imports; no thread of torch runs yet when a stage is forked off.
        context.set_forkserver_preload(["pipelive_kv.engines.reference.worker_imports"])
    return context


def _exit(code: int | None) -> str:
    if code is not None and code < 0:
        return f"killed by signal {-code} ({signal.Signals(-code).name})"
    return f"exit status {code}"


def _reap(processes: list[BaseProcess], directory: str) -> None:
    for process in processes:
        if process.pid is not None and process.is_alive():
            process.kill()
    for process in processes:
        if process.pid is not None:
            process.join(timeout=10)
    shutil.rmtree(directory, ignore_errors=True)

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
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from typing import Any

import msgspec
import zmq

from pipelive_kv.engines.reference.config import EngineFailedError
from pipelive_kv.engines.reference.messages import Failed, FromStage, Ready, Step, StepDone, Stop
from pipelive_kv.engines.reference.worker import Launch, main, results_address, steps_address

__all__ = ["StageProcesses", "private_folder"]

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
        launches: one per stage, by rank.
        on_done: called in the listening thread with every result and the time it came in.
    """

    def __init__(self, launches: list[Launch], on_done: Callable[[StepDone, float], None]) -> None:
        self._on_done = on_done
        self._events: queue.SimpleQueue[Ready | EngineFailedError] = queue.SimpleQueue()
        self._context = zmq.Context()
        self._encoder = msgspec.msgpack.Encoder()
        directory = launches[0].directory
        self._results = self._context.socket(zmq.PULL)
        self._results.bind(results_address(directory))
        self._steps: list[zmq.Socket[bytes]] = []
        for launch in launches:
            socket = self._context.socket(zmq.PUSH)
            socket.bind(steps_address(directory, launch.rank))
            self._steps.append(socket)
        start = _start_context(launches[0].config.start_method)
        self._processes: list[BaseProcess] = [
            start.Process(
                target=main, args=(launch,), name=f"pipelive-stage-{launch.rank}", daemon=True
            )
            for launch in launches
        ]
        self._stopping = threading.Event()
        self._failure: EngineFailedError | None = None
        self._complaints: list[Failed] = []
        # Also when the engine is dropped without being closed, no process stays behind.
        self._reap = weakref.finalize(self, _reap, self._processes, directory)
        try:
            for process in self._processes:
                process.start()
        except BaseException:
            self._reap()
            raise
        self._thread = threading.Thread(target=self._listen, name="pipelive-results", daemon=True)
        self._thread.start()

    @property
    def pids(self) -> tuple[int, ...]:
        """Process ids, by rank."""
        return tuple(process.pid or 0 for process in self._processes)

    def await_ready(self, timeout: float) -> None:
        """Wait until every stage has loaded its layers.

        Raises:
            EngineFailedError: if one of them failed, or is not ready in time; named by rank.
        """
        end = time.monotonic() + timeout
        missing = set(range(len(self._processes)))
        while missing:
            try:
                event = self._events.get(timeout=max(0.0, end - time.monotonic()))
            except queue.Empty:
                raise EngineFailedError(
                    f"stages {sorted(missing)} were not ready within {timeout:.0f} s"
                ) from None
            if isinstance(event, EngineFailedError):
                raise event
            missing.discard(event.rank)

    def send(self, step: Step) -> None:
        """Send a step to every stage."""
        self.check()
        encoded = self._encoder.encode(step)
        for socket in self._steps:
            socket.send(encoded)

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
        for socket in self._steps:
            with contextlib.suppress(zmq.ZMQError):
                socket.send(encoded, zmq.NOBLOCK)
        end = time.monotonic() + (0.2 if self._failure is not None else timeout)
        for process in self._processes:
            process.join(max(0.0, end - time.monotonic()))
        self._thread.join(timeout=5.0)
        self._reap()
        for socket in (*self._steps, self._results):
            socket.close(linger=0)
        self._context.term()

    # -- the listening thread ------------------------------------------------------------------

    def _listen(self) -> None:
        poller = zmq.Poller()
        poller.register(self._results, zmq.POLLIN)
        for process in self._processes:
            poller.register(process.sentinel, zmq.POLLIN)
        decoder = msgspec.msgpack.Decoder(FromStage)
        try:
            while not self._stopping.is_set():
                ready: dict[Any, int] = dict(poller.poll(200))
                if self._results in ready:
                    self._take(decoder.decode(self._results.recv()))
                elif ready and not self._stopping.is_set():
                    self._fail(self._collect(decoder))
                    return
        except Exception as error:
            self._fail(EngineFailedError(f"listening to the stages: {error}"))

    def _take(self, message: FromStage) -> None:
        if isinstance(message, StepDone):
            self._on_done(message, time.monotonic())
        elif isinstance(message, Ready):
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
        for rank, process in enumerate(self._processes):
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

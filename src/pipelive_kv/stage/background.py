"""Long work beside the engine's steps, which leaves the cores to them."""

from __future__ import annotations

import os
import platform
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Result = TypeVar("Result")


class Background:
    """Threads with a niceness of their own: for weights, for mapping memory, for the bulk of KV.

    New ones for each work: without privileges a thread cannot take its niceness back.
    """

    def __init__(self, nice: int = 0) -> None:
        """``nice`` is added to the process's own niceness."""
        self._nice = nice

    @property
    def is_nice(self) -> bool:
        """Whether work here takes longer where the cores are busy."""
        return self._nice > 0

    def threads(self, count: int) -> ThreadPoolExecutor:
        """So many threads, for as long as the executor is open."""
        return ThreadPoolExecutor(
            count, thread_name_prefix="pipelive-background", initializer=self._enter
        )

    def run(self, call: Callable[[], Result]) -> Result:
        """Make the call in such a thread and wait for its end; raises what it raises.

        A process ends without waiting for the thread: the call may wait for a peer.
        """
        if not self.is_nice:
            return call()
        done: Future[Result] = Future()

        def work() -> None:
            try:
                self._enter()
                done.set_result(call())
            except BaseException as error:
                done.set_exception(error)

        threading.Thread(target=work, name="pipelive-background", daemon=True).start()
        return done.result()

    def _enter(self) -> None:
        if not self.is_nice or platform.system() != "Linux":
            return  # elsewhere niceness is not a thread's
        usual = os.getpriority(os.PRIO_PROCESS, os.getpid())
        wanted = min(19, usual + self._nice)
        thread = threading.get_native_id()
        if os.getpriority(os.PRIO_PROCESS, thread) < wanted:
            os.setpriority(os.PRIO_PROCESS, thread, wanted)

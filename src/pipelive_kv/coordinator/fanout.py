"""One request to every stage at once, and the answers of all."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from pipelive_kv.control import ControlServer
from pipelive_kv.errors import PipeliveError
from pipelive_kv.messages import Request

_A = TypeVar("_A")


class Fanout:
    """Talks to the scheduler and to the stages through one control server."""

    def __init__(self, server: ControlServer, stages: tuple[str, ...]) -> None:
        self.server = server
        self.stages = stages
        self._check: Callable[[], object] | None = None

    @contextmanager
    def checking(self, check: Callable[[], object]) -> Iterator[None]:
        """Have ``check`` called now and then while answers are awaited; it may raise."""
        self._check = check
        try:
            yield
        finally:
            self._check = None

    def all(
        self, request: Callable[[int], Request], kind: type[_A], timeout: float
    ) -> tuple[_A, ...]:
        """Ask every stage, ``request(rank)``; wait for all answers, then raise the first error."""
        answers, errors = self._ask(request, kind, timeout)
        if errors:
            raise errors[0]
        return tuple(answers)

    def try_all(
        self, request: Callable[[int], Request], kind: type[_A], timeout: float
    ) -> list[PipeliveError]:
        """Ask every stage; the errors instead of the answers."""
        return self._ask(request, kind, timeout)[1]

    def scheduler(self, request: Request, kind: type[_A], timeout: float) -> _A:
        """Ask the scheduler."""
        future = self.server.start("scheduler", request)
        return self.server.finish("scheduler", request, future, kind, timeout, self._check)

    def try_scheduler(
        self, request: Request, kind: type[_A], timeout: float
    ) -> list[PipeliveError]:
        """Ask the scheduler; the error, if there was one, instead of the answer."""
        try:
            self.scheduler(request, kind, timeout)
        except PipeliveError as error:
            return [error]
        return []

    def _ask(
        self, request: Callable[[int], Request], kind: type[_A], timeout: float
    ) -> tuple[list[_A], list[PipeliveError]]:
        end = time.monotonic() + timeout
        sent = [
            (name, body, self.server.start(name, body))
            for name, body in ((name, request(rank)) for rank, name in enumerate(self.stages))
        ]
        answers: list[_A] = []
        errors: list[PipeliveError] = []
        for name, body, future in sent:
            try:
                rest = end - time.monotonic()
                answers.append(self.server.finish(name, body, future, kind, rest, self._check))
            except PipeliveError as error:
                errors.append(error)
        return answers, errors

"""One request to every stage at once, and the answers of all."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from pipelive_kv.control import ControlServer
from pipelive_kv.errors import PipeliveError
from pipelive_kv.messages import Request
from pipelive_kv.protocol import Course, event_of

SCHEDULER_NAME = "scheduler"

_A = TypeVar("_A")


def name_of(rank: int) -> str:
    """The name under which stage ``rank`` takes part."""
    return f"stage/{rank}"


class Fanout:
    """Talks to the scheduler and to the stages through one control server.

    With a ``course``, nothing is asked that the protocol does not allow in the job's phase.
    ``ranks`` are those of the stages that take part, ascending; some in between may have left.
    """

    def __init__(
        self, server: ControlServer, ranks: Iterable[int], course: Course | None = None
    ) -> None:
        self.server = server
        self.ranks = tuple(ranks)
        self._course = course
        self._check: Callable[[], object] | None = None

    @property
    def stages(self) -> tuple[str, ...]:
        """Their names, in the order of the ranks, in which answers come as well."""
        return tuple(map(name_of, self.ranks))

    @contextmanager
    def checking(self, check: Callable[[], object]) -> Iterator[None]:
        """Have ``check`` called now and then while answers are awaited; it may raise."""
        before, self._check = self._check, check
        try:
            yield
        finally:
            self._check = before

    def all(
        self, request: Callable[[int], Request], kind: type[_A], timeout: float
    ) -> tuple[_A, ...]:
        """Ask every stage, ``request(rank)``; wait for all answers, then raise the first error."""
        answers, errors = self._ask(request, kind, timeout, self.ranks)
        for error in errors.values():
            raise error
        return tuple(answers)

    def try_all(
        self,
        request: Callable[[int], Request],
        kind: type[_A],
        timeout: float,
        ranks: Iterable[int] | None = None,
    ) -> dict[str, PipeliveError]:
        """Ask every stage, or those of ``ranks``; the errors, by name, instead of the answers."""
        chosen = self.ranks if ranks is None else ranks
        return self._ask(request, kind, timeout, chosen)[1]

    def scheduler(self, request: Request, kind: type[_A], timeout: float) -> _A:
        """Ask the scheduler."""
        event = event_of(request)
        if self._course is not None:
            self._course.check_ask(event)
        future = self.server.start(SCHEDULER_NAME, request)
        answer = self.server.finish(SCHEDULER_NAME, request, future, kind, timeout, self._check)
        if self._course is not None:
            self._course.answered(event)
        return answer

    def try_scheduler(
        self, request: Request, kind: type[_A], timeout: float
    ) -> dict[str, PipeliveError]:
        """Ask the scheduler; the error, if there was one, instead of the answer."""
        try:
            self.scheduler(request, kind, timeout)
        except PipeliveError as error:
            return {SCHEDULER_NAME: error}
        return {}

    def missing(self) -> list[str]:
        """Who is not connected at this moment."""
        names = (SCHEDULER_NAME, *self.stages)
        return [name for name in names if not self.server.is_connected(name)]

    def _ask(
        self,
        request: Callable[[int], Request],
        kind: type[_A],
        timeout: float,
        ranks: Iterable[int],
    ) -> tuple[list[_A], dict[str, PipeliveError]]:
        end = time.monotonic() + timeout
        bodies = [(name_of(rank), request(rank)) for rank in ranks]
        events = {event_of(body) for _, body in bodies}
        if self._course is not None:
            for event in events:
                self._course.check_ask(event)
        sent = [(name, body, self.server.start(name, body)) for name, body in bodies]
        answers: list[_A] = []
        errors: dict[str, PipeliveError] = {}
        for name, body, future in sent:
            try:
                rest = end - time.monotonic()
                answers.append(self.server.finish(name, body, future, kind, rest, self._check))
            except PipeliveError as error:
                errors[name] = error
        if self._course is not None and not errors:
            for event in events:
                self._course.answered(event)
        return answers, errors

"""Calls for those who hold an ``LLM`` or an ``AsyncLLM``."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import Any

from pipelive_kv import errors
from pipelive_kv.engines.vllm.config import KEY, untested_release, wrong_release
from pipelive_kv.errors import DeadlineError, InvalidArgumentError, PipeliveError

_POLL_S = 0.02

_GRACE_S = 90.0
"""Seconds past the deadline until an outcome is there: what is decided is still completed, and a
lease's way back takes up to a minute."""


def _checked(answer: dict[str, Any]) -> dict[str, Any]:
    refused = answer.get("refused")
    if refused is not None:
        raise _error(refused)
    return answer


def _error(found: dict[str, str]) -> PipeliveError:
    kind = getattr(errors, found["type"], PipeliveError)
    return kind(found["message"]) if issubclass(kind, PipeliveError) else PipeliveError(str(found))


def _check_release() -> None:
    """Raise where engines have none of the methods that are called here."""
    release = untested_release()
    if release is not None:
        raise wrong_release(release)


def _caller(llm: Any) -> Callable[..., Any]:
    _check_release()
    call: Callable[..., Any] | None = getattr(llm.llm_engine.engine_core, "call_utility", None)
    if call is None:  # an engine core in this process, which the option is refused for
        raise InvalidArgumentError(
            f"this engine was started without additional_config.{KEY}, so it cannot move layers"
        )
    return call


class _Waiting:
    """One caller's wait for the outcome of its own reconfiguration."""

    def __init__(self, answer: dict[str, Any], timeout: float) -> None:
        self.answer = answer
        self.number: int = answer["job"]["number"]
        self._within = timeout + _GRACE_S
        self._ends_at = time.monotonic() + self._within

    def is_over(self) -> bool:
        """Whether the outcome is there.

        Raises:
            DeadlineError: it has not come for so long that it never may.
        """
        if self.answer["job"]["final"]:
            return True
        if time.monotonic() > self._ends_at:
            raise DeadlineError(
                f"reconfiguration {self.number} has no outcome after {self._within:g} s; it is in "
                f"phase {self.answer['job']['phase']}"
            )
        return False


def _report(answer: dict[str, Any]) -> dict[str, Any]:
    job: dict[str, Any] = answer["job"]
    if job["error"] is not None:
        raise _error(job["error"])
    return job


def status(llm: Any, job: int | None = None) -> dict[str, Any]:
    """Where an ``LLM`` stands: its split, its blocks, and a reconfiguration.

    Args:
        llm: a ``vllm.LLM``.
        job: the number of a reconfiguration, one of the last few; default: the last.

    Raises:
        InvalidArgumentError: the engine was started without the plugin's options, or there is no
            reconfiguration of that number, or no longer.
    """
    return _checked(_caller(llm)("pipelive_status", job))


def cancel(llm: Any) -> dict[str, Any]:
    """Give the reconfiguration under way up, unless it is decided; answers the status.

    A lease, begun with the option ``lease_steps``, is let go, so that other moves can begin once
    ``["job"]["lease"]["final"]`` says so.
    """
    return _checked(_caller(llm)("pipelive_cancel"))


def proceed(llm: Any) -> dict[str, Any]:
    """Let a reconfiguration begun with the option ``pause`` be decided; answers the status."""
    return _checked(_caller(llm)("pipelive_proceed"))


def reconfigure(
    llm: Any, layers: Sequence[int], *, timeout: float = 60.0, wait: bool = True, **options: Any
) -> dict[str, Any]:
    """Change the number of layers on each pipeline rank of an ``LLM``.

    One thread may call this while another one generates.

    Args:
        llm: a ``vllm.LLM`` that was started with the plugin's options.
        layers: layers on each rank, 1 or more each.
        timeout: seconds for the whole reconfiguration.
        wait: answer when it is done, with its report; otherwise at once, with the status, whose
            ``["job"]["number"]`` asks :func:`status` for the outcome.
        options: fields of :class:`pipelive_kv.MigrationOptions`.

    Raises:
        InvalidArgumentError: an argument does not fit.
        BusyError: another reconfiguration is under way.
        DeadlineError: it was given up at its deadline; or it is decided and still not complete long
            after it.
        PipeliveError: why it did not end as it was meant to. Before the decision the old split
            serves on; :func:`status` tells, ``["layers"]`` what serves.
    """
    call = _caller(llm)
    answer = _checked(call("pipelive_reconfigure", list(layers), timeout, options))
    if not wait:
        return answer
    waiting = _Waiting(answer, timeout)
    while not waiting.is_over():
        time.sleep(_POLL_S)
        waiting.answer = _checked(call("pipelive_job", waiting.number))
    return _report(waiting.answer)


def _caller_async(engine: Any) -> Callable[..., Any]:
    _check_release()
    call: Callable[..., Any] = engine.engine_core.call_utility_async
    return call


async def status_async(engine: Any, job: int | None = None) -> dict[str, Any]:
    """:func:`status` for an ``AsyncLLM``."""
    return _checked(await _caller_async(engine)("pipelive_status", job))


async def cancel_async(engine: Any) -> dict[str, Any]:
    """:func:`cancel` for an ``AsyncLLM``."""
    return _checked(await _caller_async(engine)("pipelive_cancel"))


async def proceed_async(engine: Any) -> dict[str, Any]:
    """:func:`proceed` for an ``AsyncLLM``."""
    return _checked(await _caller_async(engine)("pipelive_proceed"))


async def reconfigure_async(
    engine: Any, layers: Sequence[int], *, timeout: float = 60.0, wait: bool = True, **options: Any
) -> dict[str, Any]:
    """:func:`reconfigure` for an ``AsyncLLM``."""
    call = _caller_async(engine)
    answer = _checked(await call("pipelive_reconfigure", list(layers), timeout, options))
    if not wait:
        return answer
    return _report(await ended_async(engine, answer, timeout))


async def ended_async(engine: Any, answer: dict[str, Any], timeout: float) -> dict[str, Any]:
    """The status once the reconfiguration that ``answer`` is about has ended, however it did.

    Raises:
        DeadlineError: it has not, long after its ``timeout`` seconds.
    """
    call = _caller_async(engine)
    waiting = _Waiting(answer, timeout)
    while not waiting.is_over():
        await asyncio.sleep(_POLL_S)
        waiting.answer = _checked(await call("pipelive_job", waiting.number))
    return await status_async(engine, waiting.number)


async def count_async(engine: Any) -> dict[str, Any]:
    """The status, with the reconfigurations ``ended`` that nobody has counted; each comes once."""
    return _checked(await _caller_async(engine)("pipelive_count"))

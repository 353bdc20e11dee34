"""Calls for those who hold an ``LLM`` or an ``AsyncLLM``."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import Any

from pipelive_kv import errors
from pipelive_kv.errors import DeadlineError, PipeliveError

_POLL_S = 0.02


def _checked(answer: dict[str, Any]) -> dict[str, Any]:
    refused = answer.get("refused")
    if refused is not None:
        raise _error(refused)
    return answer


def _error(found: dict[str, str]) -> PipeliveError:
    kind = getattr(errors, found["type"], PipeliveError)
    return kind(found["message"]) if issubclass(kind, PipeliveError) else PipeliveError(str(found))


def _outcome(answer: dict[str, Any]) -> dict[str, Any] | None:
    """The finished job's report, None while it runs; raises why it failed."""
    job: dict[str, Any] = answer["job"]
    if not job["final"]:
        return None
    if job["error"] is not None:
        raise _error(job["error"])
    return job


def _caller(llm: Any) -> Callable[..., Any]:
    client = llm.llm_engine.engine_core
    if hasattr(client, "call_utility"):
        call: Callable[..., Any] = client.call_utility
        return call
    return lambda method, *args: getattr(client.engine_core, method)(*args)


def status(llm: Any) -> dict[str, Any]:
    """Where an ``LLM`` stands: its split, its blocks, and its last reconfiguration.

    Raises:
        InvalidArgumentError: the engine was started without the plugin's options.
    """
    return _checked(_caller(llm)("pipelive_status"))


def cancel(llm: Any) -> dict[str, Any]:
    """Give the reconfiguration under way up, unless it is decided; answers the status."""
    return _checked(_caller(llm)("pipelive_cancel"))


def proceed(llm: Any) -> dict[str, Any]:
    """Let a reconfiguration begun with the option ``pause`` be decided; answers the status."""
    return _checked(_caller(llm)("pipelive_proceed"))


def reconfigure(
    llm: Any, layers: Sequence[int], *, timeout: float = 60.0, wait: bool = True, **options: Any
) -> dict[str, Any]:
    """Change the number of layers on each pipeline rank of an ``LLM``.

    Other threads may go on to call the ``LLM`` meanwhile.

    Args:
        llm: a ``vllm.LLM`` that was started with the plugin's options.
        layers: layers on each rank, 1 or more each.
        timeout: seconds for the whole reconfiguration.
        wait: answer when it is done, with its report; otherwise at once, with the status.
        options: fields of :class:`pipelive_kv.MigrationOptions`.

    Raises:
        InvalidArgumentError: an argument does not fit.
        BusyError: another reconfiguration is under way.
        PipeliveError: why it was refused or given up; the old split serves on.
    """
    call = _caller(llm)
    answer = _checked(call("pipelive_reconfigure", list(layers), timeout, options))
    ends_at = time.monotonic() + timeout + 30
    while wait:
        report = _outcome(answer)
        if report is not None:
            return report
        if time.monotonic() > ends_at:
            raise DeadlineError(f"no outcome after {timeout + 30:g} s: {answer['job']}")
        time.sleep(_POLL_S)
        answer = _checked(call("pipelive_status"))
    return answer


async def status_async(engine: Any) -> dict[str, Any]:
    """:func:`status` for an ``AsyncLLM``."""
    return _checked(await engine.engine_core.call_utility_async("pipelive_status"))


async def cancel_async(engine: Any) -> dict[str, Any]:
    """:func:`cancel` for an ``AsyncLLM``."""
    return _checked(await engine.engine_core.call_utility_async("pipelive_cancel"))


async def proceed_async(engine: Any) -> dict[str, Any]:
    """:func:`proceed` for an ``AsyncLLM``."""
    return _checked(await engine.engine_core.call_utility_async("pipelive_proceed"))


async def reconfigure_async(
    engine: Any, layers: Sequence[int], *, timeout: float = 60.0, wait: bool = True, **options: Any
) -> dict[str, Any]:
    """:func:`reconfigure` for an ``AsyncLLM``."""
    call = engine.engine_core.call_utility_async
    answer = _checked(await call("pipelive_reconfigure", list(layers), timeout, options))
    ends_at = time.monotonic() + timeout + 30
    while wait:
        report = _outcome(answer)
        if report is not None:
            return report
        if time.monotonic() > ends_at:
            raise DeadlineError(f"no outcome after {timeout + 30:g} s: {answer['job']}")
        await asyncio.sleep(_POLL_S)
        answer = _checked(await call("pipelive_status"))
    return answer

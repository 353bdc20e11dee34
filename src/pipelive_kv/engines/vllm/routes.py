"""HTTP routes on vLLM's own API server; vLLM loads them as an endpoint plugin.

``POST /pipelive/reconfigure`` ``{"layers": [20, 10], "timeout": 60, "wait": true, "options": {}}``,
``POST /pipelive/cancel``, ``POST /pipelive/proceed`` (for one begun with the option ``pause``) and
``GET /pipelive/status?job=3`` (without a number: the last). All ask for the server's API key, which
vLLM itself does only below ``/v1``.
"""

from __future__ import annotations

import asyncio
import logging
from argparse import Namespace
from typing import Any

import msgspec

from pipelive_kv.engines.vllm.api import (
    cancel_async,
    count_async,
    ended_async,
    proceed_async,
    reconfigure_async,
    status_async,
)
from pipelive_kv.engines.vllm.metrics import Metrics
from pipelive_kv.errors import BusyError, DeadlineError, InvalidArgumentError, PipeliveError

_log = logging.getLogger(__name__)

_LOOK_EVERY_S = 5.0
"""Seconds between two looks at the engine for the metrics."""


class Wish(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The body of ``POST /pipelive/reconfigure``."""

    layers: list[int]
    timeout: float = 60.0
    wait: bool = True
    options: dict[str, Any] = {}


class _EndedError(Exception):
    """A reconfiguration did not end as it was meant to."""

    def __init__(self, status: dict[str, Any]) -> None:
        super().__init__(status)
        self._status = status

    def answer(self) -> tuple[dict[str, Any], int]:
        """(body, HTTP status): 422 only where the old split serves on as if nothing had been."""
        job = self._status["job"]
        error = job["error"]
        given_up = job["phase"] == "aborted" and job.get("left_at") == job.get("from")
        return {
            "error": f"{error['type']}: {error['message']}",
            "type": error["type"],
            "layers": self._status["layers"],
            "job": job,
        }, 422 if given_up else 500


class PipeliveEndpoints:
    """vLLM's ``EndpointPlugin``."""

    name = "pipelive"
    required_tasks = ("generate",)

    def __init__(self) -> None:
        self._engine: Any = None
        self._metrics: Metrics | None = None
        self._tokens: list[str] = []
        self._counting = asyncio.Lock()
        self._looking: asyncio.Task[None] | None = None
        self._watchers: set[asyncio.Task[dict[str, Any]]] = set()

    async def init_state(self, engine_client: Any, state: Any, args: Namespace) -> None:
        """Keep the engine's client and the server's API keys."""
        from vllm import envs  # noqa: PLC0415

        if engine_client is None:
            return  # a server that only renders
        self._engine = engine_client
        keys = getattr(args, "api_key", None) or [envs.VLLM_API_KEY]
        self._tokens = [key for key in keys if key]
        try:
            await status_async(engine_client)
        except PipeliveError:
            return  # started without the plugin's options: the routes say so
        self._metrics = Metrics()
        await self._count()
        self._looking = asyncio.ensure_future(self._look())

    async def _look(self) -> None:
        """Blocks come and go between moves, and not only these routes begin them."""
        while True:
            await asyncio.sleep(_LOOK_EVERY_S)
            try:
                await self._count()
            except Exception as error:
                _log.info("the metrics of pipelive_kv stay as they are: %s", error)
                return  # the engine has ended, and vLLM says so

    async def _count(self) -> None:
        if self._metrics is None:
            return
        async with self._counting:  # who has waited for a move finds it counted
            found = await count_async(self._engine)
            for job in found["ended"]:
                self._metrics.ended(job)
            self._metrics.standing(found)

    def attach_router(self, app: Any) -> None:
        """Add the routes."""
        from fastapi import APIRouter, Request  # noqa: PLC0415
        from fastapi.responses import JSONResponse  # noqa: PLC0415

        router = APIRouter(prefix="/pipelive")

        async def post_reconfigure(request: Any) -> Any:
            return JSONResponse(*await self._answer(request, self._reconfigure))

        async def post_cancel(request: Any) -> Any:
            return JSONResponse(*await self._answer(request, self._cancel))

        async def post_proceed(request: Any) -> Any:
            return JSONResponse(*await self._answer(request, self._proceed))

        async def get_status(request: Any) -> Any:
            return JSONResponse(*await self._answer(request, self._status))

        for path, method, handler in (
            ("/reconfigure", "POST", post_reconfigure),
            ("/cancel", "POST", post_cancel),
            ("/proceed", "POST", post_proceed),
            ("/status", "GET", get_status),
        ):
            # FastAPI reads the type, which is not there where this module is imported.
            handler.__annotations__["request"] = Request
            router.add_api_route(path, handler, methods=[method])
        app.include_router(router)

    async def _answer(self, request: Any, handle: Any) -> tuple[dict[str, Any], int]:
        """(body, HTTP status) of one request."""
        if self._tokens and not self._authorised(request):
            return {"error": "Unauthorized"}, 401
        try:
            return await handle(request), 200
        except (msgspec.DecodeError, InvalidArgumentError) as error:
            return {"error": str(error), "type": "InvalidArgumentError"}, 400
        except BusyError as error:
            return {"error": str(error), "type": "BusyError"}, 409
        except _EndedError as error:
            return error.answer()
        except DeadlineError as error:
            return {"error": str(error), "type": "DeadlineError"}, 504
        except PipeliveError as error:
            return {"error": str(error), "type": type(error).__name__}, 422

    def _authorised(self, request: Any) -> bool:
        from vllm.entrypoints.serve.middleware.authenticate import (  # noqa: PLC0415
            AuthenticationMiddleware,
        )

        checker: Any = AuthenticationMiddleware(request.app, self._tokens)
        return bool(checker.verify_token(request.headers))

    async def _status(self, request: Any) -> dict[str, Any]:
        wanted = request.query_params.get("job")
        if wanted is not None and not wanted.isdecimal():
            raise InvalidArgumentError(f"job is {wanted!r}, expected a reconfiguration's number")
        return await status_async(self._engine, None if wanted is None else int(wanted))

    async def _cancel(self, request: Any) -> dict[str, Any]:
        return await cancel_async(self._engine)

    async def _proceed(self, request: Any) -> dict[str, Any]:
        return await proceed_async(self._engine)

    async def _reconfigure(self, request: Any) -> dict[str, Any]:
        wish = msgspec.json.decode(await request.body(), type=Wish)
        if not 0 < wish.timeout <= 3600:
            raise InvalidArgumentError(f"timeout is {wish.timeout}, expected seconds up to 3600")
        misplaced = {"timeout", "wait", "layers", "engine"} & set(wish.options)
        if misplaced:
            raise InvalidArgumentError(f"options has {', '.join(sorted(misplaced))}")
        answer = await reconfigure_async(
            self._engine, wish.layers, timeout=wish.timeout, wait=False, **wish.options
        )
        watcher = asyncio.ensure_future(self._watch(answer, wish.timeout))
        self._watchers.add(watcher)
        watcher.add_done_callback(self._forget)
        if wish.wait:
            # Shielded: a client that goes away leaves the reconfiguration, and its metrics, going.
            answer = await asyncio.shield(watcher)
            if answer["job"]["error"] is not None:
                raise _EndedError(answer)
        return answer

    def _forget(self, watcher: asyncio.Task[dict[str, Any]]) -> None:
        self._watchers.discard(watcher)
        if not watcher.cancelled():
            watcher.exception()  # told to whoever waited; nobody may have

    async def _watch(self, answer: dict[str, Any], timeout: float) -> dict[str, Any]:
        found = await ended_async(self._engine, answer, timeout)
        await self._count()
        return found

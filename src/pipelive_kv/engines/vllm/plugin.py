"""Entry points that vLLM loads: ``vllm.general_plugins`` and ``vllm.endpoint_plugins``."""

from __future__ import annotations

import logging
from typing import Any

from pipelive_kv.engines.vllm.config import KEY, untested_release, wrong_release

_log = logging.getLogger(__name__)


def register() -> None:
    """Install the wrappers; vLLM calls this in every process that it starts.

    They do nothing for an engine whose ``additional_config`` does not have our key. On a release of
    vLLM that was not tested, an engine that has it is refused, and every other works as ever.
    """
    release = untested_release()
    if release is None:
        from pipelive_kv.engines.vllm import wraps  # noqa: PLC0415

        wraps.install()
    else:
        _refuse(release)


def _refuse(release: str) -> None:
    try:
        from vllm.engine.arg_utils import EngineArgs  # noqa: PLC0415

        original = EngineArgs.create_engine_config
    except (ImportError, AttributeError):  # not where the releases we know have it
        _log.warning("%s; the option %s does nothing here", wrong_release(release), KEY)
        return

    def create_engine_config(self: Any, *args: Any, **kwargs: Any) -> Any:
        if KEY in (getattr(self, "additional_config", None) or {}):
            raise wrong_release(release)
        return original(self, *args, **kwargs)

    EngineArgs.create_engine_config = create_engine_config


class NoEndpoints:
    """vLLM's ``EndpointPlugin`` without any: for releases whose engines know nothing of ours."""

    name = "pipelive"
    required_tasks = ("generate",)

    def attach_router(self, app: Any) -> None:
        """Nothing."""

    async def init_state(self, engine_client: Any, state: Any, args: Any) -> None:
        """Nothing."""


def endpoints() -> Any:
    """The HTTP routes; vLLM loads them where ``VLLM_PLUGINS`` names this plugin."""
    if untested_release() is not None:
        return NoEndpoints()
    from pipelive_kv.engines.vllm.routes import PipeliveEndpoints  # noqa: PLC0415

    return PipeliveEndpoints()

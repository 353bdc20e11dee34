"""Entry points that vLLM loads: ``vllm.general_plugins`` and ``vllm.endpoint_plugins``."""

from __future__ import annotations

from typing import Any

from pipelive_kv.engines.vllm.config import KEY, TESTED_VERSIONS
from pipelive_kv.errors import InvalidArgumentError


def register() -> None:
    """Install the wrappers; vLLM calls this in every process that it starts.

    They do nothing for an engine whose ``additional_config`` does not have our key. On a release of
    vLLM that was not tested, an engine that has it is refused, and every other works as ever.
    """
    from vllm import __version__  # noqa: PLC0415

    release = __version__.split("+")[0]
    if release in TESTED_VERSIONS:
        from pipelive_kv.engines.vllm import wraps  # noqa: PLC0415

        wraps.install()
    else:
        _refuse(release)


def _refuse(release: str) -> None:
    from vllm.engine.arg_utils import EngineArgs  # noqa: PLC0415

    original = EngineArgs.create_engine_config

    def create_engine_config(self: Any, *args: Any, **kwargs: Any) -> Any:
        if KEY in (getattr(self, "additional_config", None) or {}):
            raise InvalidArgumentError(
                f"pipelive_kv works with vLLM {', '.join(TESTED_VERSIONS)}; this is {release}"
            )
        return original(self, *args, **kwargs)

    EngineArgs.create_engine_config = create_engine_config


def endpoints() -> Any:
    """The HTTP routes; vLLM loads them where ``VLLM_PLUGINS`` names this plugin."""
    from pipelive_kv.engines.vllm.routes import PipeliveEndpoints  # noqa: PLC0415

    return PipeliveEndpoints()

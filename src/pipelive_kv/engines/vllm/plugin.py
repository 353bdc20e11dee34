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
    from vllm.v1.engine.core import EngineCore  # noqa: PLC0415

    original = EngineCore.__init__

    def init(self: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        if KEY in (getattr(vllm_config, "additional_config", None) or {}):
            raise InvalidArgumentError(
                f"pipelive_kv works with vLLM {', '.join(TESTED_VERSIONS)}; this is {release}"
            )
        original(self, vllm_config, *args, **kwargs)

    EngineCore.__init__ = init


def endpoints() -> Any:
    """The HTTP routes; vLLM loads them where ``VLLM_PLUGINS`` names this plugin."""
    from pipelive_kv.engines.vllm.routes import PipeliveEndpoints  # noqa: PLC0415

    return PipeliveEndpoints()

"""vLLM changes its pipeline split while it serves; see docs/vllm.md.

Nothing here imports vLLM before it is used: the package is a plugin that vLLM loads
(:mod:`pipelive_kv.engines.vllm.plugin`), and a few calls for those who hold an ``LLM`` or an
``AsyncLLM`` (:mod:`pipelive_kv.engines.vllm.api`).

What of vLLM is wrapped, and where, stands in :mod:`pipelive_kv.engines.vllm.wraps`.
"""

from pipelive_kv.engines.vllm.api import (
    cancel,
    cancel_async,
    proceed,
    proceed_async,
    reconfigure,
    reconfigure_async,
    status,
    status_async,
)

__all__ = [
    "cancel",
    "cancel_async",
    "proceed",
    "proceed_async",
    "reconfigure",
    "reconfigure_async",
    "status",
    "status_async",
]

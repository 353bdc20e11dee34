"""What vLLM's ``/metrics`` says about reconfigurations."""

from __future__ import annotations

from typing import Any


class Metrics:
    """Prometheus metrics in the API server's process; they appear in vLLM's own ``/metrics``."""

    def __init__(self) -> None:
        from prometheus_client import Counter, Gauge, Histogram  # noqa: PLC0415

        self._moves = Counter(
            "pipelive_reconfigurations_total", "Reconfigurations that ended.", ["outcome"]
        )
        self._stop = Histogram(
            "pipelive_stop_seconds",
            "Time that a switchover held a step up: gates and activation.",
            buckets=(0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.5),
        )
        self._bytes = Counter("pipelive_moved_bytes_total", "KV bytes sent between ranks.")
        self._layers = Gauge(
            "pipelive_layers",
            "Layers of a pipeline rank.",
            ["rank"],
            multiprocess_mode="mostrecent",
        )
        self._blocks = Gauge(
            "pipelive_kv_blocks",
            "KV blocks of every layer.",
            ["state"],
            multiprocess_mode="mostrecent",
        )

    def standing(self, status: dict[str, Any]) -> None:
        """Note how the engine stands."""
        for rank, count in enumerate(status["layers"]):
            self._layers.labels(str(rank)).set(count)
        for state, count in status["blocks"].items():
            self._blocks.labels(state).set(count)

    def ended(self, job: dict[str, Any]) -> None:
        """Note the end of a reconfiguration, as the status describes it."""
        outcome = "dry_run" if job.get("dry_run") else "done"
        if job["error"] is not None:
            outcome = "failed"
        self._moves.labels(outcome).inc()
        if outcome == "done":
            self._stop.observe(job["stop_ms"] / 1e3)
        self._bytes.inc(job.get("bytes_moved", 0))

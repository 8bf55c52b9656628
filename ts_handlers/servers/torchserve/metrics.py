"""Report a model's phases and counters as TorchServe metrics, which Prometheus can read."""

from __future__ import annotations

import threading
from typing import Any

from ts_handlers.execution.contexts import PoolStats
from ts_handlers.metrics import Metrics


class Emitter:
    """Hands each count over once, and the phases of the start once, however many requests ask for it.

    Parameters
    ----------
    metrics:
        Of the model that is served.
    """

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._lock = threading.Lock()
        self._emitted: dict[str, int] = {}
        self._contexts = PoolStats()

    def emit(self, torchserve_metrics: Any) -> None:
        """Hand the phases of a start, and what was counted since the last call, to TorchServe's metrics cache.

        Called after each request too, because threads go on counting when the start is over.
        """
        if torchserve_metrics is None or self._emitted == self._metrics.counters:
            return
        with self._lock:
            before, now = self._emitted, self._metrics.counted()
            self._emitted = now
        if not before:
            for name, value in self._metrics.phases_ms.items():
                torchserve_metrics.add_time(f"ts_handlers_{name}_ms", round(value, 2), None, "ms")
        for name, count in now.items():
            if count > before.get(name, 0):
                torchserve_metrics.add_counter(f"ts_handlers_{name}_total", count - before.get(name, 0))

    def emit_all(self, torchserve_metrics: Any, stats: PoolStats) -> None:
        """What `emit` and `emit_contexts` hand over."""
        self.emit(torchserve_metrics)
        self.emit_contexts(torchserve_metrics, stats)

    def emit_contexts(self, torchserve_metrics: Any, stats: PoolStats) -> None:
        """Hand over how many calls waited for an execution context since the last time, and how long together."""
        before, self._contexts = self._contexts, stats
        if stats.waited < before.waited or stats.wait_seconds < before.wait_seconds:  # the model has been swapped
            before = PoolStats()
        if torchserve_metrics is None or stats.waited == before.waited:
            return
        torchserve_metrics.add_counter("ts_handlers_context_waits_total", stats.waited - before.waited)
        waited_ms = (stats.wait_seconds - before.wait_seconds) * 1000
        torchserve_metrics.add_time("ts_handlers_context_wait_ms", round(waited_ms, 2), None, "ms")
        if stats.refused > before.refused:
            torchserve_metrics.add_counter("ts_handlers_context_refused_total", stats.refused - before.refused)

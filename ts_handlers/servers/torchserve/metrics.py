"""What TorchServe's metrics get of a model's phases and counters, and what the exporter gets of its requests.

TorchServe's own system has no histograms, and its names of times carry no base unit. Its names are deprecated
(docs/metrics.md) and stay for one release.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ts_handlers.compiled_model import ServedModel
from ts_handlers.errors import BusyError, InputError
from ts_handlers.execution.contexts import PoolStats
from ts_handlers.metrics import Metrics, count_as_seen
from ts_handlers.monitoring.recorder import ModelRecorder, begin_recording, recorder_of
from ts_handlers.servers.torchserve.failures import failure_of
from ts_handlers.settings import Settings, default_store_root
from ts_handlers.start import is_captured


def begin_to_record(settings: Settings, model: str) -> None:
    """Record for the exporter what this worker does, unless it is only looked at what the handler would start."""
    if not is_captured():
        begin_recording(Path(settings.store or default_store_root()).expanduser())
        recorder = recorder_of(model)
        if recorder is not None:
            recorder.begin()


class RequestMeter:
    """Counts the requests of a handler, and those that clients see fail.

    Attributes
    ----------
    name:
        The model's name.
    """

    def __init__(self) -> None:
        self.name = ""
        self._recorder: ModelRecorder | None = None
        self._served: ServedModel | None = None

    def begin(self, served: ServedModel | None) -> None:
        """The handler is initialized; `served` is its model, if it is compiled as a whole."""
        self._served = served
        self._recorder = recorder_of(self.name)
        if self._recorder is not None:
            self._recorder.serves()

    @contextlib.contextmanager
    def batch(self, rows: Any) -> Iterator[None]:
        """The handler works on a batch inside the block."""
        recorder = self._recorder
        if recorder is None:
            yield
            return
        with recorder.batch(len(rows) if isinstance(rows, (list, tuple)) else 1):
            yield

    def failed(self, error: Exception, requests: int) -> None:
        """Clients see as many requests fail with this error."""
        for _ in range(requests):
            if isinstance(error, (InputError, BusyError)):
                default = None if self._served is None else self._served.metrics
                count_as_seen("refused" if isinstance(error, InputError) else "busy", error, default)
            if self._recorder is not None:
                self._recorder.request_failed(failure_of(error).kind)


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
        if isinstance(self._metrics.recorder, ModelRecorder):
            self._metrics.recorder.contexts(stats)
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

"""Counters and times as TorchServe's metrics."""

from __future__ import annotations

from ts_handlers.execution.contexts import PoolStats
from ts_handlers.metrics import Metrics
from ts_handlers.servers.torchserve.metrics import Emitter


def test_waits_for_contexts_are_counted_again_after_the_swap() -> None:
    found: list[tuple[str, float]] = []

    class Sink:
        def add_counter(self, name: str, value: float) -> None:
            found.append((name, value))

        def add_time(self, name: str, value: float, *arguments: object) -> None:
            found.append((name, value))

    emitter = Emitter(Metrics())
    for stats in (PoolStats(waited=5, wait_seconds=1.0), PoolStats(), PoolStats(waited=1, wait_seconds=0.25)):
        emitter.emit_contexts(Sink(), stats)
    waits, times = "ts_handlers_context_waits_total", "ts_handlers_context_wait_ms"
    assert [pair for pair in found if pair[1]] == [(waits, 5), (times, 1000.0), (waits, 1), (times, 250.0)]

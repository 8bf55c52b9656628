"""Phases and counters."""

from __future__ import annotations

import itertools

import pytest

from ts_handlers import metrics as module
from ts_handlers.metrics import Metrics


def test_a_phase_does_not_count_the_phases_inside_it(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = itertools.count()
    monkeypatch.setattr(module.time, "perf_counter", lambda: next(ticks) / 1000)  # each look at the clock takes 1 ms
    metrics = Metrics()
    with metrics.phase("lookup"):
        with metrics.phase("fetch"):
            pass
        with metrics.phase("fetch"), metrics.phase("load"):
            pass
    with metrics.phase("lookup"):
        pass
    # lookup: 7 ticks without the fetches' 1 and 3, then 1 more; fetch: 1 and 3 without the load's 1
    assert metrics.phases_ms == pytest.approx({"lookup": 4.0, "fetch": 3.0, "load": 1.0})


def test_only_declared_counters_count() -> None:
    metrics = Metrics()
    metrics.count("takeover")
    assert metrics.counters["takeover"] == 1
    with pytest.raises(KeyError):
        metrics.count("nonsense")

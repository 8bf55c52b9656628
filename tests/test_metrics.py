"""Phases and counters."""

from __future__ import annotations

import itertools
import sys
import types

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


def test_only_declared_phases_are_timed() -> None:
    metrics = Metrics()
    with pytest.raises(ValueError, match="no phase of a start is called 'lokup'"), metrics.phase("lokup"):
        pass
    with pytest.raises(ValueError, match="no phase of a build is called 'exprt'"), metrics.build_phase("exprt"):
        pass
    with metrics.build_phase("export"), metrics.build_phase("my_backend.quantise"):
        pass
    assert (set(metrics.phases_ms), set(metrics.build_ms)) == (set(), {"export", "my_backend.quantise"})


def test_each_compiled_graph_is_told_once_and_those_of_a_start_never(monkeypatch: pytest.MonkeyPatch) -> None:
    graphs = 0
    monkeypatch.setitem(sys.modules, "torch._dynamo.utils", types.ModuleType("torch._dynamo.utils"))
    monkeypatch.setattr(module, "compiled_graphs", lambda: graphs)
    monkeypatch.setattr(module, "_graphs_seen", 0)
    assert module.graphs_for_requests() == 0
    graphs = 2
    assert (module.graphs_for_requests(), module.graphs_for_requests()) == (2, 0)
    with module.start_under_way():
        graphs = 3
        assert module.graphs_for_requests() == 0
        graphs = 5
    assert module.graphs_for_requests() == 0
    graphs = 0  # torch._dynamo.reset
    assert module.graphs_for_requests() == 0
    graphs = 1
    assert module.graphs_for_requests() == 1


def test_a_module_that_is_being_imported_has_counted_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch._dynamo.utils", types.ModuleType("torch._dynamo.utils"))
    assert module.compiled_graphs() == 0

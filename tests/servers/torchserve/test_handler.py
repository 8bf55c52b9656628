"""The lifecycle of a handler: its start, what it reports and what it describes."""

from __future__ import annotations

import json
import logging
import signal
from pathlib import Path

import pytest

from tests.support.file_backend import START
from tests.support.subprocesses import finish, start_python

pytest.importorskip("ts", reason="TorchServe is not installed")

from ts.context import Context, RequestProcessor

from tests.support.handlers import make_context
from ts_handlers import CompiledHandler, CompiledModel
from ts_handlers.errors import QuarantinedError
from ts_handlers.guard.quarantine import lift_quarantine, read_quarantines

pytestmark = pytest.mark.usefixtures("cheap_backend")


def test_initialize_starts_the_model_and_reports_metrics(handler: CompiledHandler, context: Context) -> None:
    assert isinstance(handler.model, CompiledModel)
    assert handler.model.outcome.result == "built"
    assert handler.initialized
    assert {"ts_handlers_build_ms", "ts_handlers_build_total", "ts_handlers_miss_total"} <= set(context.metrics.names)


def test_second_worker_hits(handler: CompiledHandler, archive: Path, tmp_path: Path) -> None:
    second = CompiledHandler()
    second.initialize(make_context(archive, tmp_path / "store"))
    assert second.model.outcome.result == "hit"


def test_requests_do_not_wait_for_the_collection_of_what_a_start_made(context: Context) -> None:
    import gc

    gc.unfreeze()
    made = CompiledHandler()
    made.initialize(context)
    assert gc.get_freeze_count() > 10_000
    assert len(gc.get_objects()) < gc.get_freeze_count() / 10


def test_describe_says_how_the_start_went(handler: CompiledHandler, context: Context) -> None:
    context.request_processor = [RequestProcessor({"describe": "True"})]
    (facts,) = handler.handle([{}], context)
    facts = json.loads(json.dumps(facts))
    assert {"backend", "key", "result", "missed", "phases_ms", "build_ms", "fallbacks", "counters", "pid"} <= set(facts)
    assert (facts["backend"], facts["result"], facts["fallbacks"]) == ("aot_inductor", "built", [])
    assert len(facts["key"]) == 32
    assert facts["counters"]["build"] == 1
    assert {"key", "lookup", "build", "publish", "load", "canary", "warmup"} <= set(facts["phases_ms"])


def test_build_that_nearly_took_the_startup_timeout_warns(
    archive: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    CompiledHandler().initialize(make_context(archive, tmp_path / "store", startupTimeout=0))
    assert "set startupTimeout: 60" in caplog.text
    caplog.clear()
    CompiledHandler().initialize(make_context(archive, tmp_path / "store", startupTimeout=0))
    assert "startupTimeout" not in caplog.text  # a hit builds nothing


@pytest.mark.processes
def test_strict_does_not_load_what_ended_a_process_and_names_the_remedy(archive: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    CompiledHandler().initialize(make_context(archive, store))
    crash = {"CRASH_AT": "load", "BUILD_LOG": str(tmp_path / "log")}
    finish(start_python(START, archive, store, **crash), -signal.SIGSEGV)
    with pytest.raises(QuarantinedError) as caught:
        CompiledHandler().initialize(make_context(archive, store, section={"strict": True}))
    (record,) = read_quarantines(store)
    assert "Segmentation fault while loading" in str(caught.value)
    assert f"`ts-handlers unquarantine {record.key[:12]} --store {store}`" in str(caught.value)
    lenient = CompiledHandler()
    lenient.initialize(make_context(archive, store))
    assert lenient.model.outcome.backend == "eager"
    lift_quarantine(store, record.key)
    handler = CompiledHandler()
    handler.initialize(make_context(archive, store, section={"strict": True}))
    assert handler.model.outcome.result == "hit"

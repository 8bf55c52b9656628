"""A handler's model is ready for the exporter when its `initialize` has ended, whatever of it is compiled."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("ts", reason="TorchServe is not installed")

from tests.support.handlers import ask, make_context
from tests.support.models import eager_model
from ts_handlers import CompiledHandler, CompiledHandlerMixin
from ts_handlers.exporter.collecting import Collector, is_ready
from ts_handlers.monitoring.recorder import stop_recording
from ts_handlers.start import captured_start


@pytest.fixture(autouse=True)
def _recording_of_this_test() -> Iterator[None]:
    stop_recording()
    yield
    stop_recording()


@pytest.mark.usefixtures("cheap_backend")
def test_a_handler_is_starting_in_initialize_and_ready_afterwards(archive: Path, tmp_path: Path) -> None:
    seen: list[dict[str, Any]] = []
    collector = Collector(tmp_path / "store")

    class Handler(CompiledHandler):
        def load_model(self, *arguments: Any, **options: Any) -> Any:
            seen.append(collector.progress()["model"])
            return eager_model(archive)

    handler = Handler()
    handler.initialize(make_context(archive, tmp_path / "store"))
    assert [(each["state"], each["serving"]) for each in seen[:1]] == [("compiling", False)]
    assert is_ready(collector.progress())
    assert handler.describe_handle()["progress"]["state"] == "ready"


class Pipeline:
    """Holds no module."""

    def initialize(self, context: Any) -> None:
        self.model = sum

    def handle(self, data: Any, context: Any) -> Any:
        return [self.model(row["body"]) for row in data]


def test_a_handler_with_nothing_to_compile_is_ready_too(archive: Path, tmp_path: Path) -> None:
    class Handler(CompiledHandlerMixin, Pipeline):  # type: ignore[misc]
        pass

    handler: Any = Handler()
    context = make_context(archive, tmp_path / "store", section={"inputs": [], "dimensions": {}})
    handler.initialize(context)
    collector = Collector(tmp_path / "store")
    assert (collector.progress()["model"]["state"], is_ready(collector.progress(), ["model"])) == ("ready", True)
    assert ask(handler, context, [1, 2], [3]) == [(200, 3), (200, 3)]
    assert collector.series()["requests_total", ("model",)] == [2.0]


@pytest.mark.usefixtures("cheap_backend")
def test_who_only_looks_at_what_a_handler_would_start_records_nothing(archive: Path, tmp_path: Path) -> None:
    with captured_start():
        CompiledHandler().initialize(make_context(archive, tmp_path / "store"))
    assert Collector(tmp_path / "store").progress() == {}

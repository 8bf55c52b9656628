"""`refused` counts requests that clients saw refused and no others, and each failure counts once, by kind."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("ts", reason="TorchServe is not installed")

from tests.support.handlers import ROWS, ask, make_context
from ts_handlers import CompiledHandler
from ts_handlers.errors import BusyError, InputError
from ts_handlers.monitoring.gathering import gather
from ts_handlers.monitoring.recorder import folder_of, stop_recording

WIDE = [[1.0, 2.0, 3.0, 4.0, 5.0]]


@pytest.fixture(autouse=True)
def _recording_of_this_test() -> Iterator[None]:
    stop_recording()
    yield
    stop_recording()


def start(context: Any, kind: type[CompiledHandler] = CompiledHandler) -> Any:
    handler = kind()
    handler.initialize(context)
    return handler


def errors(store: Path) -> dict[str, float]:
    series = gather([folder_of(store)]).series
    return {key[1][1]: numbers[0] for key, numbers in series.items() if key[0] == "request_errors_total" and numbers[0]}


def requests(store: Path) -> float:
    return gather([folder_of(store)]).series["requests_total", ("model",)][0]


MICRO = {"micro_batching": {"micro_batch_size": 2, "parallelism": {"preprocess": 1, "inference": 2, "postprocess": 1}}}


@pytest.mark.usefixtures("cheap_backend")
@pytest.mark.parametrize("config", [{}, MICRO], ids=["together", "micro-batches"])
def test_a_batch_that_is_answered_again_one_by_one_counts_each_refusal_once(
    archive: Path, tmp_path: Path, config: dict[str, Any]
) -> None:
    context = make_context(archive, tmp_path / "store", **config)
    handler = start(context)
    statuses = [status for status, _ in ask(handler, context, ROWS, WIDE, ROWS, b"no JSON", WIDE)]
    assert statuses == [200, 400, 200, 400, 400]
    assert handler.model.metrics.counters["refused"] == 3
    assert errors(tmp_path / "store") == {"invalid_input": 3.0}
    assert [status for status, _ in ask(handler, context, WIDE)] == [400]
    assert handler.model.metrics.counters["refused"] == 4
    assert (errors(tmp_path / "store"), requests(tmp_path / "store")) == ({"invalid_input": 4.0}, 6.0)


@pytest.mark.usefixtures("cheap_backend")
def test_what_the_model_refuses_counts_once_though_it_is_asked_twice(archive: Path, tmp_path: Path) -> None:
    import torch

    class Handler(CompiledHandler):
        def preprocess(self, data: Any) -> Any:
            return [torch.tensor(row["body"]) for row in data]

        def inference(self, data: Any, *args: Any, **kwargs: Any) -> Any:
            return [self.model(each) for each in data]

        def postprocess(self, data: Any) -> Any:
            return [each.tolist() for each in data]

    context = make_context(archive, tmp_path / "store")
    handler = start(context, Handler)
    assert [status for status, _ in ask(handler, context, ROWS, WIDE, ROWS)] == [200, 400, 200]
    assert handler.model.metrics.counters["refused"] == 1
    assert errors(tmp_path / "store") == {"invalid_input": 1.0}


@pytest.mark.usefixtures("cheap_backend")
def test_a_refusal_that_the_handler_answers_itself_counts_nowhere(archive: Path, tmp_path: Path) -> None:
    class Handler(CompiledHandler):
        def inference(self, data: Any, *args: Any, **kwargs: Any) -> Any:
            try:
                return super().inference(data, *args, **kwargs)
            except InputError:
                return super().inference({"x": data["x"][:, :4]})

    context = make_context(archive, tmp_path / "store")
    handler = start(context, Handler)
    assert [status for status, _ in ask(handler, context, WIDE)] == [200]
    assert handler.model.metrics.counters["refused"] == 0
    assert errors(tmp_path / "store") == {}


@pytest.mark.usefixtures("cheap_backend")
def test_failures_count_by_kind(archive: Path, tmp_path: Path) -> None:
    from ts.utils.util import PredictionException

    raised: list[Exception] = []

    class Handler(CompiledHandler):
        def inference(self, *args: Any, **kwargs: Any) -> Any:
            raise raised[0]

    context = make_context(archive, tmp_path / "store")
    handler = start(context, Handler)
    kinds = {
        "busy": BusyError("all contexts are in use"),
        "out_of_memory": MemoryError(),
        "handler": PredictionException("not today", 418),
        "internal": KeyError("x"),
    }
    for kind, error in kinds.items():
        raised[:] = [error]
        answers = [status for status, _ in ask(handler, context, ROWS, ROWS)]
        assert answers == [{"busy": 503, "out_of_memory": 507, "handler": 418, "internal": 503}[kind]] * 2
        assert errors(tmp_path / "store").pop(kind) == 2.0
    assert handler.model.metrics.counters["busy"] == 2
    with pytest.raises(KeyError):  # TorchServe answers a batch of one
        ask(handler, context, ROWS)
    assert errors(tmp_path / "store")["internal"] == 3.0


@pytest.mark.usefixtures("cheap_backend")
def test_a_failure_behind_an_envelope_counts_once(archive: Path, tmp_path: Path) -> None:
    from ts.torch_handler.request_envelope.json import JSONEnvelope

    context = make_context(archive, tmp_path / "store")
    handler = start(context)
    envelope = JSONEnvelope(handler.handle)
    handler_of_envelope = type("Served", (), {"handle": staticmethod(envelope.handle)})
    bodies = [{"instances": [{"data": row} for row in rows]} for rows in (ROWS, WIDE)]
    answers = ask(handler_of_envelope, context, *bodies)
    assert [status for status, _ in answers][1] in (400, 503)
    assert sum(errors(tmp_path / "store").values()) == sum(status != 200 for status, _ in answers)


@pytest.mark.usefixtures("cheap_backend")
def test_direct_calls_count_at_once(archive: Path, tmp_path: Path) -> None:
    import torch

    handler = start(make_context(archive, tmp_path / "store"))
    for _ in range(2):
        with pytest.raises(InputError):
            handler.model(torch.zeros(1, 5))
    assert handler.model.metrics.counters["refused"] == 2

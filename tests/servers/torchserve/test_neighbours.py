"""One request of a batch does not fail another: errors of every phase, describe and explain beside predictions."""

from __future__ import annotations

import importlib
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("ts", reason="TorchServe is not installed")

from ts.context import Context, RequestProcessor
from ts.utils.util import PredictionException

from tests.support.handlers import ROWS, ask, close, expected, make_context
from ts_handlers import CompiledHandler

pytestmark = pytest.mark.usefixtures("cheap_backend")

MICRO = {"micro_batch_size": 2, "parallelism": {"preprocess": 1, "inference": 1, "postprocess": 1}}
both_ways = pytest.mark.parametrize("config", [{}, {"micro_batching": MICRO}], ids=["plain", "micro-batching"])

ERRORS: dict[str, tuple[Exception, int, str]] = {
    "key": (KeyError("x" * 5000), 503, "Prediction failed"),
    "index": (IndexError("no"), 503, "Prediction failed"),
    "runtime": (RuntimeError("no"), 503, "Prediction failed"),
    "assertion": (AssertionError(), 503, "Prediction failed"),
    "memory": (MemoryError("no"), 507, "Out of resources"),
    "cuda": (RuntimeError("CUDA out of memory"), 507, "Out of resources"),
    "own status": (PredictionException("no such language", 422), 422, "no such language"),
    "long own status": (PredictionException("no" * 5000, 422), 422, "no" * 100),
}


class Failing(CompiledHandler):
    """Raises, in the phase that a request names, the error that it names; also when it is one of several."""

    def preprocess(self, data: Any) -> Any:
        bodies = [row.pop("body") for row in data]  # a second attempt must see the request as it came
        self.batch_state.faults = [body.get("fault") for body in bodies]
        self._fail("preprocess")
        return torch.cat([torch.tensor(body["x"]) for body in bodies])

    def inference(self, data: Any, *args: Any, **kwargs: Any) -> Any:
        self._fail("inference")
        return super().inference(data, *args, **kwargs)

    def postprocess(self, data: Any) -> Any:
        self._fail("postprocess")
        return [[row.tolist()] for row in data]

    def _fail(self, phase: str) -> None:
        for fault in self.batch_state.faults:
            if fault is not None and fault[0] == phase:
                raise ERRORS[fault[1]][0]


def fault(phase: str, error: str) -> dict[str, Any]:
    return {"x": ROWS[:1], "fault": [phase, error]}


@both_ways
@pytest.mark.parametrize("phase", ["preprocess", "inference", "postprocess"])
@pytest.mark.parametrize("error", ERRORS)
def test_an_error_of_any_phase_fails_its_request_alone(
    error: str, phase: str, config: dict[str, Any], archive: Path, tmp_path: Path
) -> None:
    handler = Failing()
    context = make_context(archive, tmp_path / "store", **config)
    handler.initialize(context)
    bodies = [{"x": ROWS[:1]}, fault(phase, error), {"x": ROWS[1:]}, {"x": ROWS[:1]}]
    context.request_processor = [RequestProcessor({}) for _ in bodies]
    answers = handler.handle([{"body": body} for body in bodies], context)
    _, status, message = ERRORS[error]
    assert [context.get_response_status(index)[0] for index in range(4)] == [200, status, 200, 200]
    facts = json.loads(answers[1])
    assert (facts["code"], facts["type"]) == (status, "InternalServerException")
    assert facts["message"].startswith(message)
    assert len(answers[1]) < 1024
    assert close(answers[0], expected(archive, ROWS[:1]))
    assert close(answers[2], expected(archive, ROWS[1:]))


def test_a_batch_of_one_is_torchserves_to_answer(context: Context) -> None:
    handler = Failing()
    handler.initialize(context)
    with pytest.raises(RuntimeError, match="no"):
        ask(handler, context, fault("inference", "runtime"))


@pytest.mark.parametrize("text", ["x" * 100_000, "a\n[METRICS]Forged.Count:1|#Level:Model", "\x1b[2J", "\ud800"])
def test_a_text_that_a_request_has_made_is_logged_bounded_and_escaped(
    text: str, context: Context, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)

    class Handler(CompiledHandler):
        def preprocess(self, data: Any) -> Any:
            raise RuntimeError(text)

    handler = Handler()
    handler.initialize(context)
    caplog.clear()
    ((status, answer),) = ask(handler, context, ROWS)
    assert (status, json.loads(answer)["message"]) == (503, "Prediction failed")
    (record,) = caplog.records
    written = record.getMessage()
    assert "RuntimeError" in written
    assert len(written) < 20_000
    assert written.replace("\n", "").isprintable()
    assert "\n[METRICS]" not in written


def test_an_integer_beyond_every_float_is_refused_alone(
    handler: CompiledHandler, context: Context, archive: Path
) -> None:
    answers = ask(handler, context, ROWS, [[10**400, 0.5, 0, 0]], ROWS[:1])
    assert [status for status, _ in answers] == [200, 400, 200]
    assert close(answers[0][1], expected(archive, ROWS))


@both_ways
def test_an_answer_that_cannot_be_sent_fails_its_request_alone(
    config: dict[str, Any], archive: Path, tmp_path: Path
) -> None:
    """TorchServe encodes texts outside its own error handling, so the worker would end."""

    class Echo(CompiledHandler):
        def preprocess(self, data: Any) -> Any:
            self.batch_state.texts = [self.request_body(row) for row in data]
            return torch.zeros(len(data), 4)

        def postprocess(self, data: Any) -> Any:
            return self.batch_state.texts

    handler = Echo()
    context = make_context(archive, tmp_path / "store", **config)
    handler.initialize(context)
    assert [status for status, _ in ask(handler, context, "a", "\ud800", "c")] == [200, 503, 200]
    with pytest.raises((ValueError, RuntimeError), match=r"surrogate|expected a list of 1 answers"):
        ask(handler, context, "\ud800")


def send(handler: Any, context: Context, requests: list[tuple[dict[str, Any], dict[str, str]]]) -> list[Any]:
    """Send rows with headers."""
    context.request_processor = [RequestProcessor(headers) for _, headers in requests]
    answers = handler.handle([row for row, _ in requests], context)
    assert len(answers) == len(requests)
    return list(answers)


DESCRIBE: tuple[dict[str, Any], dict[str, str]] = ({}, {"host": "127.0.0.1:8081", "describe": "True"})


@both_ways
@pytest.mark.parametrize("place", [0, 1, 2])
def test_describe_in_a_batch_of_predictions_is_answered_by_itself(
    place: int, config: dict[str, Any], archive: Path, tmp_path: Path
) -> None:
    handler = CompiledHandler()
    context = make_context(archive, tmp_path / "store", **config)
    handler.initialize(context)
    requests: list[Any] = [({"body": ROWS}, {}), ({"body": ROWS[:1]}, {})]
    requests.insert(place, DESCRIBE)
    answers = send(handler, context, requests)
    facts = answers.pop(place)
    assert facts["counters"]["build"] == 1
    assert close(answers[0], expected(archive, ROWS))
    assert close(answers[1], expected(archive, ROWS[:1]))


FORGED = {
    "a body": ({"body": ROWS}, {"describe": "True", "Content-Type": "application/json"}),
    "data": ({"data": ROWS}, {"describe": "True"}),
    "no body": ({"body": b""}, {"describe": "True"}),
    "a form without fields": ({}, {"describe": "True", "Content-Type": "multipart/form-data; boundary=x"}),
    "an empty form": ({}, {"describe": "True", "content-type": "Application/X-WWW-Form-Urlencoded"}),
    "another case": ({"body": ROWS}, {"Describe": "True", "Content-Type": "application/json"}),
}


@both_ways
@pytest.mark.parametrize("case", FORGED)
@pytest.mark.parametrize("neighbours", [0, 1])
def test_a_prediction_with_the_header_of_describe_is_a_prediction(
    neighbours: int, case: str, config: dict[str, Any], archive: Path, tmp_path: Path
) -> None:
    handler = CompiledHandler()
    context = make_context(archive, tmp_path / "store", **config)
    handler.initialize(context)
    answers = send(handler, context, [FORGED[case], *[({"body": ROWS[:1]}, {})] * neighbours])
    if next(iter(FORGED[case][0].values()), None):
        assert close(answers[0], expected(archive, ROWS))
    else:
        assert context.get_response_status(0)[0] == 400
    assert "counters" not in str(answers)
    assert "pid" not in str(answers)
    for answer in answers[1:]:
        assert close(answer, expected(archive, ROWS[:1]))


def test_an_explanation_does_not_turn_its_batch_into_explanations(context: Context, archive: Path) -> None:
    class Handler(CompiledHandler):
        def explain_handle(self, data_preprocess: Any, raw_data: Any) -> Any:
            return ["because"] * len(raw_data)

    handler = Handler()
    handler.initialize(context)
    answers = send(
        handler, context, [({"body": ROWS}, {"explain": "True"}), ({"body": ROWS}, {}), ({"body": ROWS}, {})]
    )
    assert answers[0] == "because"
    assert close(answers[1], expected(archive, ROWS))
    assert close(answers[2], expected(archive, ROWS))


@pytest.mark.parametrize("name", ["json", "body"])
@both_ways
def test_what_an_envelope_cannot_read_fails_alone(
    config: dict[str, Any], name: str, archive: Path, tmp_path: Path
) -> None:
    module = importlib.import_module(f"ts.torch_handler.request_envelope.{name}")
    kind = {"json": "JSONEnvelope", "body": "BodyEnvelope"}[name]
    handler = CompiledHandler()
    context = make_context(archive, tmp_path / "store", **config)
    handler.initialize(context)
    envelope = getattr(module, kind)(handler.handle)

    def row(rows: Any) -> dict[str, Any]:
        return {"body": {"instances": [{"body": rows}] * 3} if name == "json" else rows}

    bad: dict[str, Any] = {"body": {"nothing": 1}}
    requests = [(row(ROWS), {}), (bad, {}), DESCRIBE, (row(ROWS[:1]), {}), (row([[1, 2]]), {})]
    context.request_processor = [RequestProcessor(headers) for _, headers in requests]
    answers = envelope.handle([body for body, _ in requests], context)
    assert len(answers) == 5
    unreadable = 503 if name == "json" else 400
    assert [context.get_response_status(index)[0] for index in range(5)] == [200, unreadable, 200, 200, 400]
    assert answers[2]["counters"]["build"] == 1
    for answer, rows in ((answers[0], ROWS), (answers[3], ROWS[:1])):
        given = json.loads(answer)["predictions"] if name == "json" else [answer]
        assert len(given) == (3 if name == "json" else 1)
        assert all(close(each, expected(archive, rows)) for each in given)

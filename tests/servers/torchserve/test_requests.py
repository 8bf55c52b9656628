"""Requests to a handler: their forms, batches, refusals and answers."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.models import write_archive

pytest.importorskip("ts", reason="TorchServe is not installed")

from ts.context import Context

from tests.support.handlers import ROWS, ask, close, expected, make_context
from ts_handlers import CompiledHandler, InputError

pytestmark = pytest.mark.usefixtures("cheap_backend")


@pytest.mark.parametrize(
    "body",
    [
        ROWS,
        {"x": ROWS},
        json.dumps(ROWS),
        json.dumps({"x": ROWS}).encode(),
        bytearray(json.dumps(ROWS).encode()),
    ],
    ids=["list", "object", "text", "bytes", "bytearray"],
)
def test_request_forms(body: Any, handler: CompiledHandler, context: Context, archive: Path) -> None:
    ((status, answer),) = ask(handler, context, body)
    assert status == 200
    assert close(answer, expected(archive, ROWS))


def test_batch_is_joined_and_split_again(handler: CompiledHandler, context: Context, archive: Path) -> None:
    calls: list[int] = []
    loaded = handler.model._loaded
    counted = lambda tensors: calls.append(len(tensors[0])) or loaded.run(tensors)  # noqa: E731
    handler.model._loaded = dataclasses.replace(loaded, run=counted)
    answers = ask(handler, context, ROWS, ROWS[:1], ROWS[1:])
    assert [len(answer) for _, answer in answers] == [2, 1, 1]
    assert close(answers[2][1], expected(archive, ROWS[1:]))
    assert calls == [4]


def test_batch_beyond_the_declared_range_is_answered_one_by_one(
    handler: CompiledHandler, context: Context, archive: Path
) -> None:
    answers = ask(handler, context, *[ROWS] * 5)
    assert [status for status, _ in answers] == [200] * 5
    assert close(answers[4][1], expected(archive, ROWS))


BAD: dict[str, Any] = {
    "no JSON": b"{half",
    "no text": b"\xff\xfe\x00",
    "empty": b"",
    "none": None,
    "a number": 3,
    "text": json.dumps("hello"),
    "ragged": [[1, 2, 3, 4], [1, 2]],
    "letters": [["a", "b", "c", "d"]],
    "null inside": [[1, 2, 3, None]],
    "wrong width": [[1, 2, 3]],
    "no rows": [],
    "empty rows": [[]],
    "too many rows": [[0, 0, 0, 0]] * 9,
    "one dimension more": [ROWS],
    "unknown input": {"y": ROWS},
    "one input too many": {"x": ROWS, "y": ROWS},
    "nothing named": {},
    "an object as value": {"x": {"a": 1}},
    "endless nesting": b"[" * 100_000,
    "nested lists without end": b"[" * 900 + b"]" * 900,
    "huge number": [[10**400, 0, 0, 0]],
}


@pytest.mark.parametrize("case", BAD)
def test_bad_request_is_refused_and_leaves_the_others_alone(
    case: str, handler: CompiledHandler, context: Context, archive: Path
) -> None:
    ((status, answer),) = ask(handler, context, BAD[case])
    assert status == 400
    facts = json.loads(answer)
    assert (facts["code"], facts["type"]) == (400, "InputError")
    assert facts["message"]
    assert context.get_response_headers(0)["content-type"] == "application/json"
    answers = ask(handler, context, ROWS, BAD[case], ROWS[:1])
    assert [status for status, _ in answers] == [200, 400, 200]
    assert close(answers[0][1], expected(archive, ROWS))
    assert close(answers[2][1], expected(archive, ROWS[:1]))


@pytest.mark.parametrize(
    ("dtype", "value", "status"),
    [
        ("int64", [[1, 2]], 200),
        ("int64", [[1.5, 2]], 400),
        ("uint8", [[255, 0]], 200),
        ("uint8", [[256, 0]], 400),
        ("uint8", [[-1, 0]], 400),
        ("int8", [[128, 0]], 400),
        ("bool", [[True, False]], 200),
        ("bool", [[1, 0]], 200),
        ("bool", [[2, 0]], 400),
        ("int64", [[2**70, 0]], 400),
        ("float16", [[1, 2]], 200),
    ],
)
def test_values_are_never_changed_to_fit_a_dtype(
    dtype: str, value: list[list[Any]], status: int, tmp_path: Path
) -> None:
    code = "import torch\n\n\nclass Model(torch.nn.Module):\n    def forward(self, x):\n        return x.float()\n"
    archive = write_archive(tmp_path / "archive", code, seed=None)
    section = {"inputs": [{"name": "x", "dtype": dtype, "shape": ["batch", 2]}], "backends": ["eager"]}
    context = make_context(archive, tmp_path / "store", {"modelFile": "model.py"}, section=section)
    handler = CompiledHandler()
    handler.initialize(context)
    ((found, answer),) = ask(handler, context, value)
    assert found == status
    if status == 200:
        assert answer == [[float(item) for item in value[0]]]


def test_answers_keep_the_structure_of_the_output(tmp_path: Path) -> None:
    code = """
        import torch


        class Model(torch.nn.Module):
            def forward(self, x):
                return {"double": x * 2, "pair": (x + 1, [x.sum(1), "text", None])}
    """
    archive = write_archive(tmp_path / "archive", code, seed=None)
    section = {"backends": ["eager"]}
    context = make_context(archive, tmp_path / "store", {"modelFile": "model.py"}, section=section)
    handler = CompiledHandler()
    handler.initialize(context)
    answers = ask(handler, context, [[1, 2, 3, 4]], [[0, 0, 0, 1]])
    assert answers[1] == (200, {"double": [[0, 0, 0, 2]], "pair": [[[1, 1, 1, 2]], [[1], "text", None]]})
    json.dumps(answers)


class Strict(CompiledHandler):
    """Raises what the request names."""

    def preprocess(self, data: Any) -> Any:
        for row in data:
            body = self.request_body(row)
            if isinstance(body, dict) and "raise" in body:
                raise {"value": ValueError, "input": InputError, "key": KeyError, "unicode": _unicode}[body["raise"]](
                    "no"
                )
        return torch.cat([torch.tensor(self.request_body(row)["x"]) for row in data])

    def postprocess(self, data: Any) -> Any:
        return [[row.tolist()] for row in data]


def _unicode(text: str) -> UnicodeDecodeError:
    return UnicodeDecodeError("utf-8", b"\xff", 0, 1, text)


@pytest.mark.parametrize("kind", ["value", "input", "unicode"])
def test_value_errors_of_an_own_preprocess_refuse_that_request(kind: str, context: Context, archive: Path) -> None:
    handler = Strict()
    handler.initialize(context)
    answers = ask(handler, context, {"x": ROWS[:1]}, {"raise": kind}, {"x": ROWS[1:]})
    assert [status for status, _ in answers] == [200, 400, 200]
    assert "no" in json.loads(answers[1][1])["message"]
    assert close(answers[2][1], expected(archive, ROWS[1:]))


def test_other_errors_are_not_hidden(context: Context) -> None:
    handler = Strict()
    handler.initialize(context)
    with pytest.raises(KeyError):
        ask(handler, context, {"raise": "key"})


def test_requests_have_a_body(handler: CompiledHandler) -> None:
    assert handler.request_body({"data": b"x"}) == b"x"
    assert handler.request_body({"body": "y"}) == "y"
    for row in ({}, {"body": b""}, {"data": ""}, {"body": None}):
        with pytest.raises(InputError, match="Content-Type"):
            handler.request_body(row)

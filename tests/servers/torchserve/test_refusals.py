"""What a request can write into an answer is bounded: a refusal is shorter than 1 KiB."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("ts", reason="TorchServe is not installed")

from ts.context import Context

from tests.support.handlers import ROWS, ask, close, expected
from ts_handlers import CompiledHandler

pytestmark = pytest.mark.usefixtures("cheap_backend")

MOST = 1024
ODD: dict[str, Any] = {
    "a long name": {"\u0001" * 1_000_000: ROWS},
    "a long name of surrogates": {"\ud800" * 1_000_000: ROWS},
    "a long name in emoji": {"\U0001f525" * 500_000: ROWS},
    "many names": {f"{number}": 1 for number in range(100_000)},
    "a name with control characters": {"\x1b[2J\r\n[METRICS]": ROWS},
    "a long text": {"x": "y" * 10_000_000},
    "long texts": [["y" * 1_000_000] * 4],
    "a huge integer": [[10**4000, 0, 0, 0]],
    "a huge integer beside a fraction": [[10**4000, 0.5, 0, 0]],
    "a huge integer as text": b"[[" + b"9" * 1_000_000 + b"]]",
    "deep": json.loads("[" * 900 + "]" * 900),
    "deep text": b"[" * 1_000_000,
    "deep objects": b'{"x":' * 100_000,
    "no text": b"\xff" * 1_000_000,
    "no JSON": b"{" + b"\\u0001" * 500_000,
}


@pytest.mark.parametrize("case", ODD)
def test_a_refusal_is_short_whatever_the_request_holds(
    case: str, handler: CompiledHandler, context: Context, archive: Path
) -> None:
    answers = ask(handler, context, ROWS, ODD[case], ROWS[:1])
    assert [status for status, _ in answers] == [200, 400, 200]
    assert len(answers[1][1].encode()) < MOST
    assert answers[1][1].isprintable()
    assert json.loads(answers[1][1])["type"] == "InputError"
    assert close(answers[0][1], expected(archive, ROWS))


@pytest.mark.parametrize("text", ["y", "\U0001f525", "\ud800", "\x00", "é"])
def test_a_refusal_of_an_own_preprocess_is_short(text: str, context: Context) -> None:
    class Handler(CompiledHandler):
        def preprocess(self, data: Any) -> Any:
            return float(self.request_body(data[0])) if len(data) == 1 else super().preprocess(data)

    handler = Handler()
    handler.initialize(context)
    for length in (10, 960, 1_000_000):
        ((status, answer),) = ask(handler, context, text * length)
        assert status == 400
        assert len(answer.encode()) < MOST
        assert "could not convert string to float" in json.loads(answer)["message"]


def test_unknown_names_given_to_the_model_are_counted_and_not_listed(context: Context) -> None:
    class Handler(CompiledHandler):
        def inference(self, data: Any, *args: Any, **kwargs: Any) -> Any:
            return self.model(**data, **{f"name{number:06}": 1 for number in range(100_000)})

    handler = Handler()
    handler.initialize(context)
    ((status, answer),) = ask(handler, context, ROWS)
    assert status == 400
    found = "unknown input 'name000000' and 99999 more; declared are x (handler.ts_handlers.inputs"
    assert found in json.loads(answer)["message"]

"""Numbers that a dtype or JSON does not have: refused in requests, null or refused in answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.models import LINEAR, write_archive
from ts_handlers.errors import InputError
from ts_handlers.servers.json_tensors import read_tensors, rows_of
from ts_handlers.settings import InputSpec

pytest.importorskip("ts", reason="TorchServe is not installed")

from tests.support.handlers import ask, make_context
from ts_handlers import CompiledHandler


@pytest.mark.parametrize(
    ("dtype", "value"),
    [
        ("float32", 1e39),
        ("float32", -1e39),
        ("float16", 70000),
        ("float16", 70000.0),
        ("float16", 1e39),
        ("bfloat16", 3.4e38),
    ],
)
def test_a_finite_number_never_becomes_infinite(dtype: Any, value: float) -> None:
    spec = InputSpec("speed", dtype, ("batch", 2))
    with pytest.raises(
        InputError, match=rf"input 'speed': the value {value:.6g} does not fit {dtype}".replace("+", ".")
    ):
        read_tensors({"speed": [[0, value]]}, [spec])


@pytest.mark.parametrize(
    ("dtype", "value"), [("float32", 3.4e38), ("float16", 65504), ("float64", 1e308), ("float16", 1e-9)]
)
def test_what_fits_is_read(dtype: Any, value: float) -> None:
    found = read_tensors({"x": [value]}, [InputSpec("x", dtype, ("batch",))])["x"]
    assert found.dtype == getattr(torch, dtype)
    assert found.isfinite().all()


@pytest.mark.parametrize("literal", ["NaN", "Infinity", "-Infinity", "1e999"])
@pytest.mark.parametrize("dtype", ["float32", "float64", "int64"])
def test_literals_that_are_no_json_are_refused(literal: str, dtype: Any) -> None:
    """Also in a body that the server has parsed."""
    spec = InputSpec("x", dtype, ("batch",))
    for body in (f"[{literal}]", f"[{literal}]".encode(), json.loads(f"[{literal}]")):
        with pytest.raises(InputError):
            read_tensors(body, [spec])


def test_answers_have_null_in_the_place_of_what_json_does_not_have() -> None:
    value = (torch.tensor([[1.0, float("nan")], [float("inf"), 2.0]]), {"mean": float("-inf")}, torch.tensor([3]))
    assert rows_of(value) == [[[1.0, None], [None, 2.0]], {"mean": None}, [3]]
    assert rows_of(value[0], 0, 1) == [[1.0, None]]
    assert rows_of(torch.tensor([1.0, float("nan")], dtype=torch.float16)) == [1.0, None]


@pytest.mark.parametrize("non_finite", [None, "refuse"])
def test_a_handler_answers_null_or_refuses(non_finite: str | None, tmp_path: Path) -> None:
    archive = write_archive(tmp_path / "archive", LINEAR.replace("self.layer(x)", "1 / x"))
    section = {"backends": ["eager"], "non_finite": non_finite}
    context = make_context(archive, tmp_path / "store", section=section)
    handler = CompiledHandler()
    handler.initialize(context)
    bad, good = ask(handler, context, [[1, 2, 0, 4]], [[1, 2, 4, 8]])
    assert good == (200, [[1, 0.5, 0.25, 0.125]])
    if non_finite is None:
        assert bad == (200, [[1, 0.5, None, 0.25]])
        assert json.dumps(bad[1], allow_nan=False)
    else:
        assert bad[0] == 400
        assert "non_finite" in json.loads(bad[1])["message"]
    ((status, answer),) = ask(handler, context, b"[[1, NaN, 0, 4]]")
    assert (status, "NaN" in json.loads(answer)["message"]) == (400, True)

"""Requests that are answered together keep their own rows; what has no row for each of theirs is answered alone."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.handlers import ROWS, ask, make_context
from tests.support.models import LINEAR, write_archive

pytest.importorskip("ts", reason="TorchServe is not installed")

from ts_handlers import CompiledHandler, InputError
from ts_handlers.errors import BusyError
from ts_handlers.servers.json_tensors import have_rows, join_rows, read_tensors, split_rows
from ts_handlers.settings import InputSpec

MICRO: dict[str, Any] = {"micro_batching": {"micro_batch_size": 4}}
TWO = LINEAR.replace("def forward(self, x):", "def forward(self, x, y):").replace("return self.layer(x)", "return {}")


def declared(name: str, *shape: int | str) -> dict[str, Any]:
    return {"name": name, "dtype": "float32", "shape": list(shape)}


def start(handler: CompiledHandler, folder: Path, code: str, *inputs: dict[str, Any], **config: Any) -> Any:
    names = {size for spec in inputs for size in spec["shape"] if isinstance(size, str)}
    dimensions = {name: {"min": 1, "max": 8} for name in names}
    section = {"backends": ["eager"], "inputs": list(inputs), "dimensions": dimensions}
    context = make_context(write_archive(folder / "archive", code), folder / "store", section=section, **config)
    handler.initialize(context)
    return context


@pytest.mark.parametrize("config", [{}, MICRO], ids=["plain", "micro-batching"])
@pytest.mark.parametrize(
    ("output", "shape", "bodies"),
    [
        # Rows that would complete one another's.
        ("x + y", ("batch", 1), [{"x": [[1], [2]], "y": [[10]]}, {"x": [[3]], "y": [[30], [40]]}]),
        ("x * y.sum()", ("n",), [{"x": [[1]], "y": [1, 2]}, {"x": [[1]], "y": [100]}]),
        ("x * y", (), [{"x": [[1]], "y": 2}, {"x": [[1]], "y": 3}]),
        ("(x + y).sum(0)", ("batch", 1), [{"x": [[1]], "y": [[2]]}, {"x": [[10]], "y": [[20]]}]),
        ("{'y': x + y, 'mean': x.mean()}", ("batch", 1), [{"x": [[1]], "y": [[2]]}, {"x": [[10]], "y": [[20]]}]),
        ("{'y': x + y, 'rows': x.shape[0]}", ("batch", 1), [{"x": [[1]], "y": [[2]]}, {"x": [[10]], "y": [[20]]}]),
        ("x + y", ("batch", 1), [{"x": 5, "y": [[1]]}, {"x": [[1]], "y": [[1]]}]),
    ],
)
def test_the_same_alone_and_together(
    output: str, shape: tuple[int | str, ...], bodies: list[Any], config: dict[str, Any], tmp_path: Path
) -> None:
    inputs = declared("x", "batch", 1), declared("y", *shape)
    first, second = CompiledHandler(), CompiledHandler()
    context = start(first, tmp_path / "first", TWO.format(output), *inputs, **config)
    together = ask(first, context, *bodies)
    context = start(second, tmp_path / "second", TWO.format(output), *inputs, **config)
    assert [ask(second, context, body)[0] for body in bodies] == together


def test_a_single_request_gets_all_of_an_output_that_is_not_by_row(tmp_path: Path) -> None:
    handler = CompiledHandler()
    context = start(
        handler, tmp_path, LINEAR.replace("return self.layer(x)", "return x.sum(0)"), declared("x", "batch", 4)
    )
    assert ask(handler, context, [[1, 2, 3, 4]]) == [(200, [1, 2, 3, 4])]
    # Four rows and an output of four numbers: that it is not by row is known from before.
    assert ask(handler, context, *[[[1, 2, 3, 4]]] * 4) == [(200, [1, 2, 3, 4])] * 4


def test_rows_are_joined_and_split_by_their_counts() -> None:
    specs = [
        InputSpec(name="x", dtype="float32", shape=("batch", 1)),
        InputSpec(name="y", dtype="int64", shape=("batch",)),
    ]
    rows = [{"x": torch.zeros(n, 1), "y": torch.full((n,), n)} for n in (1, 3, 2)]
    joined, counts = join_rows(rows, specs)
    assert counts == [1, 3, 2]
    assert split_rows((joined["y"], None), counts) == [[[1], None], [[3, 3, 3], None], [[2, 2], None]]
    assert split_rows(joined["y"][:5], counts) is None
    assert have_rows(specs)
    rows[1]["y"] = torch.zeros(2, dtype=torch.int64)
    with pytest.raises(InputError, match="different numbers of rows"):
        join_rows(rows, specs)


def test_float64_does_not_pass_through_float32() -> None:
    specs = [InputSpec(name="x", dtype="float64", shape=("batch",))]
    assert read_tensors(b"[0.1, 16777217.0]", specs)["x"].tolist() == [0.1, 16777217.0]


class Busy(CompiledHandler):
    """Finds no context free, and counts how often it asked for one."""

    asked = 0

    def inference(self, data: Any, *args: Any, **kwargs: Any) -> Any:
        self.asked += 1
        raise BusyError("no context")


@pytest.mark.parametrize(("config", "asked"), [({}, 1), (MICRO, 2)], ids=["plain", "micro-batching"])
def test_a_batch_waits_once_for_a_context(config: dict[str, Any], asked: int, tmp_path: Path) -> None:
    handler = Busy()
    context = start(handler, tmp_path, LINEAR, declared("x", "batch", 4), **config)
    assert [status for status, _ in ask(handler, context, *[ROWS] * 8)] == [503] * 8
    assert handler.asked == asked


def test_behind_a_request_that_found_no_context_nobody_waits_again(tmp_path: Path) -> None:
    handler = Busy()
    context = start(handler, tmp_path, LINEAR, declared("x", "batch", 4))
    answers = ask(handler, context, b"{half", *[ROWS] * 6)
    assert [status for status, _ in answers] == [400, *[503] * 6]
    assert handler.asked == 1


@pytest.mark.parametrize("config", [{}, MICRO], ids=["plain", "micro-batching"])
def test_a_failed_batch_keeps_no_tensors(config: dict[str, Any], tmp_path: Path) -> None:
    class Failing(CompiledHandler):
        def preprocess(self, data: Any) -> Any:
            return torch.ones(37, 41)

        def inference(self, data: Any, *args: Any, **kwargs: Any) -> Any:
            raise RuntimeError("broken")

    handler = Failing()
    context = start(handler, tmp_path, LINEAR, declared("x", "batch", 4), **config)
    gc.collect()
    gc.disable()
    try:
        for _ in range(5):
            assert [status for status, _ in ask(handler, context, *[ROWS] * 8)] == [503] * 8
        alive = [each for each in gc.get_objects() if type(each) is torch.Tensor and each.shape == (37, 41)]
    finally:
        gc.enable()
    assert len(alive) <= 7  # what the threads' last frames may hold

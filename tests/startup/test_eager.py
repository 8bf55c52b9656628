"""The eager model always serves what plain TorchServe serves, and answers once before READY."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.models import archive_source, settings_of, write_archive
from ts_handlers import CompiledModel, ModuleSource, Settings, start_model
from ts_handlers.errors import SettingsError
from ts_handlers.key.fingerprint import digest_tensors, tensor_specification

pytest.importorskip("ts", reason="TorchServe is not installed")

from tests.support.handlers import ask, make_context
from ts_handlers import CompiledHandlerMixin
from ts_handlers.servers.torchserve.base_handler import BaseHandler

ROWS = torch.arange(8.0).reshape(2, 4)
MODEL = """
import torch


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(4, 3)
        {init}

    def forward({parameters}):
        return {output}
"""


def code(parameters: str = "self, x", output: str = "self.layer(x)", init: str = "pass") -> str:
    return MODEL.format(parameters=parameters, output=output, init=init)


def start(folder: Path, text: str, **changes: Any) -> CompiledModel:
    archive = write_archive(folder / "archive", text)
    changes.setdefault("backends", ["eager"])
    return start_model(archive_source(archive), settings_of(store=str(folder / "store"), **changes))


@pytest.mark.parametrize("layout", ["to_sparse()", "to_sparse_csr()", "to_sparse_csc()"])
@pytest.mark.parametrize("backends", [["eager"], ["aot_inductor", "eager"]])
@pytest.mark.usefixtures("backend")
@pytest.mark.filterwarnings("ignore:Sparse")
def test_a_sparse_buffer_ends_no_start(layout: str, backends: list[str], tmp_path: Path) -> None:
    text = code(
        output="self.layer((self.table @ x.t()).t())",
        init=f"self.register_buffer('table', (2 * torch.eye(4)).{layout})",
    )
    model = start(tmp_path, text, backends=backends)
    assert torch.allclose(model(ROWS), torch.nn.functional.linear(2 * ROWS, model.layer.weight, model.layer.bias))


@pytest.mark.filterwarnings("ignore:Sparse")
def test_sparse_tensors_are_told_apart_by_indices_and_values() -> None:
    first = torch.tensor([[0.0, 1.0], [0.0, 0.0]])
    tensors = [first.to_sparse(), first.t().to_sparse(), (first * 2).to_sparse(), first, first.to_sparse_csr()]
    assert len({digest_tensors({"x": tensor}) for tensor in tensors}) == 5
    assert len({tensor_specification({"x": tensor}) for tensor in tensors}) == 3
    assert digest_tensors({"x": first.to_sparse()}) == digest_tensors({"x": first.clone().to_sparse()})


@pytest.mark.parametrize(
    ("parameters", "output"),
    [
        ("self, batch: dict", "self.layer(batch['x']) + batch['y']"),
        ("self, batch", "self.layer(batch['x']) + batch['y']"),
        ("self, **inputs", "self.layer(inputs['x']) + inputs['y']"),
        ("self, x, **others", "self.layer(x) + others['y']"),
    ],
)
def test_declared_inputs_reach_forward(parameters: str, output: str, tmp_path: Path) -> None:
    inputs = [{"name": name, "dtype": "float32", "shape": ["batch", size]} for name, size in (("x", 4), ("y", 3))]
    model = start(tmp_path, code(parameters, output), inputs=inputs)
    assert model.outcome.notes == ()
    expected = torch.nn.functional.linear(ROWS, model.layer.weight, model.layer.bias) + 1
    assert torch.allclose(model(x=ROWS, y=torch.ones(2, 3)), expected)


class Gives(CompiledHandlerMixin, BaseHandler):
    """Its `preprocess` has given `data`."""

    data: Any = None

    def preprocess(self, data: Any) -> Any:
        return self.data

    def postprocess(self, data: Any) -> Any:
        return data.tolist()


@pytest.mark.parametrize(
    ("parameters", "output", "data"),
    [
        ("self, batch: dict", "self.layer(batch['x'])", {"x": ROWS}),
        ("self, **inputs", "self.layer(inputs['x'])", {"x": ROWS}),
        ("self, images, targets=None", "self.layer(torch.stack(images))", [ROWS[0], ROWS[1]]),
        ("self, pair", "self.layer(pair[0])", (ROWS, ROWS)),
        ("self, x, y", "self.layer(x)", (ROWS, ROWS)),
        ("self, x", "self.layer(x)", {"x": ROWS}),
    ],
)
def test_without_declared_inputs_forward_gets_what_it_takes(
    parameters: str, output: str, data: Any, tmp_path: Path
) -> None:
    archive = write_archive(tmp_path / "archive", code(parameters, output))
    section = {"inputs": [], "dimensions": {}, "backends": ["eager"]}
    context = make_context(archive, tmp_path / "store", section=section)
    handler = Gives()
    handler.initialize(context)
    handler.data = data
    layer = handler.model.layer
    found = torch.tensor([answer for _, answer in ask(handler, context, None, None)])
    assert torch.allclose(found, torch.nn.functional.linear(ROWS, layer.weight, layer.bias))


def test_a_model_that_refuses_what_is_drawn_is_served_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    picky = code(output="self.layer(x) if float(x.sum()) == 28.0 else 1 / 0")
    model = start(tmp_path, picky)
    assert model(ROWS).shape == (2, 3)
    (note,) = model.describe()["notes"]
    assert "did not answer before READY" in note
    assert "ZeroDivisionError" in note
    assert "x (float32, shape [4, 4])" in note
    assert note in caplog.text


def test_inputs_that_fit_no_call_are_refused_before_anything_is_built(tmp_path: Path, backend: Any) -> None:
    inputs = [{"name": "ids", "dtype": "float32", "shape": ["batch", 4]}]
    for backends in (["aot_inductor", "eager"], ["eager"]):
        with pytest.raises(SettingsError, match=r"forward of Model takes \(input_ids, attention_mask\).* ids"):
            start(tmp_path, code("self, input_ids, attention_mask"), inputs=inputs, backends=backends)


def test_nothing_is_tried_where_nothing_is_declared() -> None:
    ran: list[int] = []

    class Counted(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            ran.append(1)
            return x

    model = start_model(ModuleSource("counted", Counted()), Settings(backends=("eager",)))
    assert ran == []
    assert model.outcome.independent_rows is None

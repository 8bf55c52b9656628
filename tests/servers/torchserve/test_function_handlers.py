"""Handlers that are a function at module level: wrapped, loaded by TorchServe's loader, their module swapped."""

from __future__ import annotations

import asyncio
import json
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("ts", reason="TorchServe is not installed")

from ts.context import RequestProcessor
from ts.model_loader import TsModelLoader

from tests.support.handlers import ROWS, Metrics, close, expected
from tests.support.models import LINEAR_SECTION
from ts_handlers import CompiledModel
from ts_handlers.servers.torchserve.wrapping import find_handler, write_handler

pytestmark = pytest.mark.usefixtures("cheap_backend")

SERVICE = """
import os

import torch
from model import Model


class Service:
    def __init__(self):
        self.model = None

    def initialize(self, context):
        folder = context.system_properties["model_dir"]
        self.model = Model()
        self.model.load_state_dict(torch.load(os.path.join(folder, "model.pt")))
        self.model.eval()


_service = Service()
calls = []


def handle(data, context):
    calls.append(data is None)
    if _service.model is None:
        _service.initialize(context)
    if data is None:
        return None
    with torch.no_grad():
        return [_service.model(torch.tensor(row["body"])).tolist() for row in data]
"""
GLOBAL = """
import os

import torch
from model import Model

model = None


def handle(data, context):
    global model
    if data is None:
        model = Model()
        model.load_state_dict(torch.load(os.path.join(context.system_properties["model_dir"], "model.pt")))
        return None
    with torch.no_grad():
        return [model(torch.tensor(row["body"])).tolist() for row in data]
"""
NOTHING = """
def handle(data, context):
    return None if data is None else [row["body"] for row in data]
"""
ASYNCHRONOUS = """
async def handle(data, context):
    return None if data is None else [row["body"] for row in data]
"""


@pytest.fixture
def load(archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Wrap a handler file and load it as TorchServe's worker does; returns the handler and its context."""

    def load(code: str) -> tuple[Any, Any]:
        (archive / "their_handler.py").write_text(textwrap.dedent(code))
        write_handler(find_handler(str(archive / "their_handler.py")), archive / "warm.py")
        (archive / "MAR-INF").mkdir(exist_ok=True)
        model = {"modelName": "model", "handler": "warm.py", "configFile": "model-config.yaml"}
        (archive / "MAR-INF" / "MANIFEST.json").write_text(json.dumps({"model": model}))
        section = {**LINEAR_SECTION, "store": str(tmp_path / "store"), "backends": ["aot_inductor", "eager"]}
        (archive / "model-config.yaml").write_text(json.dumps({"handler": {"ts_handlers": section}}))
        monkeypatch.syspath_prepend(str(archive))
        for name in ("their_handler", "warm", "model"):
            monkeypatch.delitem(sys.modules, name, raising=False)
        metrics: Any = Metrics()
        metrics.set_request_ids = lambda ids: None
        service = TsModelLoader().load("model", str(archive), "warm.py", None, 1, None, True, metrics)
        return service._entry_point.__self__, service.context

    return load


@pytest.mark.parametrize("code", [SERVICE, GLOBAL])
def test_a_module_that_the_functions_file_holds_is_swapped(code: str, load: Any, archive: Path) -> None:
    for result in ("built", "hit"):
        handler, context = load(code)
        assert isinstance(handler.model, CompiledModel)
        assert (handler.model.outcome.backend, handler.model.outcome.result) == ("aot_inductor", result)
        context.request_processor = [RequestProcessor({}), RequestProcessor({})]
        answers = handler.handle([{"body": ROWS[:1]}, {"body": ROWS[1:]}], context)
        assert close([answer[0] for answer in answers], expected(archive, ROWS))
        assert handler.model.metrics.counters["outside_eager"] == 0
        theirs: Any = sys.modules["their_handler"]
        holder = theirs if code is GLOBAL else theirs._service
        assert holder.model is handler.model
        context.request_processor = [RequestProcessor({"describe": "True"})]
        (facts,) = handler.handle([{}], context)
        assert facts["backend"] == "aot_inductor"
    if code is SERVICE:
        assert sys.modules["their_handler"].calls == [True, False]  # one call without data, as TorchServe makes it


def test_a_function_without_a_module_is_served_as_it_is(load: Any) -> None:
    handler, context = load(NOTHING)
    context.request_processor = [RequestProcessor({})]
    assert handler.handle([{"body": 5}], context) == [5]
    assert "no self.model" in handler.describe_handle()["reason"]


def test_an_asynchronous_function_is_awaited_by_the_server(load: Any) -> None:
    handler, context = load(ASYNCHRONOUS)
    context.request_processor = [RequestProcessor({}), RequestProcessor({})]
    assert asyncio.run(handler.handle([{"body": 5}, {"body": 6}], context)) == [5, 6]


def test_two_modules_in_a_functions_file_are_left_alone(load: Any) -> None:
    handler, _ = load(SERVICE + "\n\nother = Service()\nother.model = torch.nn.Linear(1, 1)\n")
    assert handler.model is None
    assert isinstance(sys.modules["their_handler"]._service.model, torch.nn.Module)

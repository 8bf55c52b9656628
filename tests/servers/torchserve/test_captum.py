"""Captum's integrated gradients through a compiled model: the numbers that the plain module gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("ts", reason="TorchServe is not installed")
pytest.importorskip("captum", reason="captum is not installed")

from captum import attr as captum
from ts.torch_handler.base_handler import BaseHandler

from tests.support.handlers import ask, close, make_context
from tests.support.models import eager_model, write_archive
from ts_handlers import CompiledHandlerMixin

pytestmark = pytest.mark.usefixtures("cheap_backend")
BAG = """
import torch


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = torch.nn.EmbeddingBag(20, 8)
        self.layer = torch.nn.Linear(8, 3)

    def forward(self, words, offsets):
        return self.layer(self.embedding(words, offsets))
"""
ROW = [[1.0, 2.0, 3.0, 4.0]]
WORDS = [3, 7, 1]


def start(theirs: type, archive: Path, tmp_path: Path, section: dict[str, Any]) -> tuple[Any, Any]:
    class Handler(CompiledHandlerMixin, theirs):  # type: ignore[misc]
        pass

    context = make_context(archive, tmp_path / "store", section=section)
    handler: Any = Handler()
    handler.initialize(context)
    return handler, context


class Rows(BaseHandler):  # type: ignore[misc]
    """Makes captum's object from its model at the start, as TorchServe's vision handlers do."""

    def initialize(self, context: Any) -> None:
        super().initialize(context)
        self.gradients = captum.IntegratedGradients(self.model)

    def preprocess(self, data: Any) -> torch.Tensor:
        return torch.cat([torch.tensor(row["body"]) for row in data])

    def get_insights(self, tensors: torch.Tensor, raw: Any, target: int = 0) -> Any:
        return self.gradients.attribute(tensors, target=target, n_steps=5).tolist()


class Words(BaseHandler):  # type: ignore[misc]
    """Attributes to its embedding layer, as TorchServe's text handlers do."""

    def initialize(self, context: Any) -> None:
        super().initialize(context)
        self.gradients = captum.LayerIntegratedGradients(self.model, self.model.embedding)

    def preprocess(self, data: Any) -> torch.Tensor:
        return torch.tensor(data[0]["body"])

    def inference(self, words: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        with torch.no_grad():
            return self.model(words, torch.tensor([0]))

    def get_insights(self, words: torch.Tensor, raw: Any, target: int = 0) -> Any:
        offsets = torch.tensor([0])
        found = self.gradients.attribute(
            words, torch.zeros_like(words), additional_forward_args=(offsets,), target=target, n_steps=5
        )
        return [found.tolist()]


def test_integrated_gradients_of_the_input(archive: Path, tmp_path: Path) -> None:
    for result in ("built", "hit"):
        handler, context = start(Rows, archive, tmp_path, {})
        assert handler.model.outcome.result == result
        wanted = captum.IntegratedGradients(eager_model(archive)).attribute(torch.tensor(ROW), target=0, n_steps=5)
        ((status, answer),) = ask(handler, context, ROW, header={"explain": "True"})
        assert status == 200
        assert close(answer, wanted[0].tolist())


def test_integrated_gradients_of_a_layer(tmp_path: Path) -> None:
    archive = write_archive(tmp_path / "words", BAG)
    section = {
        "inputs": [
            {"name": "words", "dtype": "int64", "shape": ["length"], "values": [0, 20]},
            {"name": "offsets", "dtype": "int64", "shape": [1], "values": [0, 1]},
        ],
        "dimensions": {"length": {"min": 1, "max": 16}},
        "backends": ["eager"],
    }
    handler, context = start(Words, archive, tmp_path, section)
    module: Any = eager_model(archive)
    words = torch.tensor(WORDS)
    wanted = captum.LayerIntegratedGradients(module, module.embedding).attribute(
        words, torch.zeros_like(words), additional_forward_args=(torch.tensor([0]),), target=0, n_steps=5
    )
    ((status, answer),) = ask(handler, context, WORDS, header={"explain": "True"})
    assert status == 200
    assert close(answer, wanted.tolist())
    assert ask(handler, context, WORDS)[0][0] == 200

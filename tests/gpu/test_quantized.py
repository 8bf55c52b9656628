"""Quantised models on a real GPU: compared with eager, which computes the same quantisation in floating point."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.marks import TENSORRT
from tests.support.models import archive_source, eager_model, settings_of, write_archive
from tests.support.quantized_models import quantized_code
from ts_handlers import ExportedSource, start_model

pytestmark = TENSORRT
SECTION: dict[str, Any] = {
    "inputs": [{"name": "x", "dtype": "float32", "shape": ["batch", 64]}],
    "dimensions": {"batch": {"min": 1, "max": 16}},
    "warmup": [{"batch": 8}],
    "canary": {"tolerance": 0.02},
    "backends": ["tensorrt", "eager"],
}


@pytest.mark.parametrize(
    ("precision", "activations", "layers"), [("int8", False, 2), ("int8", True, 4), ("fp8", False, 2), ("fp8", True, 4)]
)
def test_a_quantised_model_answers_as_its_eager_form(
    tmp_path: Path, precision: str, activations: bool, layers: int
) -> None:
    """Flavours and GPUs differ in what they take: what TensorRT refuses is served eagerly with TensorRT's reason."""
    folder = write_archive(tmp_path / "archive", quantized_code(precision, activations=activations))
    section = {**SECTION, "store": str(tmp_path / "s"), "tensorrt": {"precision": precision}}
    for result in ("built", "hit"):
        model = start_model(archive_source(folder), settings_of(section), "cuda:0")
        x = torch.randn(5, 64, generator=torch.Generator().manual_seed(1)).cuda()
        with torch.inference_mode():
            expected = eager_model(folder).cuda()(x)
        assert float((model(x) - expected).norm() / expected.norm()) < 0.02
        if model.outcome.backend == "eager":
            reason = model.outcome.fallbacks[0]["reason"]
            assert "TensorRT built no plan" in reason
            pytest.skip(f"{precision}, activations {activations}: {reason[:300]}")
        assert (model.outcome.backend, model.outcome.result) == ("tensorrt", result)
        assert model.describe()["artifact"]["quantized"] == {precision: layers}


def test_a_quantised_program_in_a_file_of_its_own(tmp_path: Path) -> None:
    folder = write_archive(tmp_path / "archive", quantized_code("int8", activations=False))
    eager = eager_model(folder)
    shapes = ({0: torch.export.Dim("batch", min=1, max=16)},)
    program = torch.export.export(eager, (torch.randn(3, 64),), dynamic_shapes=shapes, strict=False)
    torch.export.save(program, tmp_path / "model.pt2")
    section = {**SECTION, "store": str(tmp_path / "s"), "backends": ["tensorrt"], "strict": True}
    model = start_model(ExportedSource("m", tmp_path / "model.pt2"), settings_of(section), "cuda:0")
    x = torch.randn(5, 64).cuda()
    with torch.inference_mode():
        expected = eager.cuda()(x)
    assert float((model(x) - expected).norm() / expected.norm()) < 0.02


def test_a_model_that_is_not_quantised_is_not_taken_for_one(tmp_path: Path) -> None:
    code = "import torch\n\n\nclass Model(torch.nn.Linear):\n    def __init__(self):\n        super().__init__(64, 4)\n"
    folder = write_archive(tmp_path / "archive", code)
    section = {**SECTION, "store": str(tmp_path / "s"), "tensorrt": {"precision": "int8"}}
    section["inputs"] = [{"name": "input", "dtype": "float32", "shape": ["batch", 64]}]
    model = start_model(archive_source(folder), settings_of(section), "cuda:0")
    assert model.outcome.backend == "eager"
    assert "declares a quantised model" in model.outcome.fallbacks[0]["reason"]

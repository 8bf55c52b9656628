"""The model that a server calls, in this process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.models import archive_source, eager_model, settings_of
from tests.support.starts import ROWS, Start
from ts_handlers import CompiledModel, ModuleSource, Settings, start_model
from ts_handlers.errors import (
    InputError,
)

pytestmark = pytest.mark.usefixtures("backend")


@pytest.fixture
def start(archive: Path, tmp_path: Path) -> Start:
    def run(directory: Path = archive, **changes: Any) -> CompiledModel:
        section = {"store": str(tmp_path / "store"), "backends": ["aot_inductor", "eager"], **changes}
        return start_model(archive_source(directory), settings_of(**section))

    return run


def test_requests_outside_are_refused_or_answered_eagerly(start: Start, archive: Path) -> None:
    model = start()
    with pytest.raises(InputError, match=r"size 9 is outside the declared range 1\.\.8"):
        model(torch.zeros(9, 4))
    assert model.metrics.counters["refused"] == 1
    lenient = start(outside="eager")
    rows = torch.randn(9, 4)
    assert torch.allclose(lenient(x=rows), eager_model(archive)(rows), atol=1e-5)
    assert lenient.metrics.counters["outside_eager"] == 1
    with pytest.raises(InputError, match="missing"):
        lenient()


def test_model_behaves_like_the_eager_one_where_handlers_look(start: Start, archive: Path) -> None:
    model = start()
    assert model.eval() is model
    assert model.to("cpu") is model
    assert model.device == torch.device("cpu")
    assert model.layer.out_features == 3
    with pytest.raises(AttributeError):
        _ = model.no_such_attribute


def test_module_without_declared_inputs_runs_eagerly() -> None:
    model = start_model(ModuleSource("m", torch.nn.Linear(4, 1)), Settings(backends=("eager",)))
    assert model(ROWS).shape == (2, 1)
    assert model.describe()["result"] == "eager"

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
    FrozenModelError,
    InputError,
)
from ts_handlers.model.explanations import explanations

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


CHANGES = {
    "load_state_dict": lambda model: model.load_state_dict(
        {"layer.weight": torch.zeros(3, 4), "layer.bias": torch.ones(3)}
    ),
    "hook": lambda model: model.register_forward_hook(lambda module, inputs, output: output * 0 + 1),
    "pre-hook": lambda model: model.register_forward_pre_hook(lambda module, inputs: (inputs[0] * 0,)),
    "half": lambda model: model.half(),
    "double": lambda model: model.double(),
    "to a dtype": lambda model: model.to(torch.bfloat16),
    "to a dtype by name": lambda model: model.to("cpu", dtype=torch.float16),
    "a submodule": lambda model: setattr(model, "layer", torch.nn.Linear(4, 3)),
    "a parameter": lambda model: setattr(model, "extra", torch.nn.Parameter(torch.zeros(1))),
    "a private buffer": lambda model: setattr(model, "_table", torch.zeros(1)),
    "an attribute": lambda model: setattr(model, "training", True),
    "a deletion": lambda model: delattr(model, "layer"),
    "train": lambda model: model.train(),
    "half of a module around it": lambda model: torch.nn.Sequential(model).half(),
    "load_state_dict of a module around it": lambda model: torch.nn.Sequential(model).load_state_dict(
        {"0.layer.weight": torch.zeros(3, 4), "0.layer.bias": torch.ones(3)}
    ),
    "apply": lambda model: model.apply(lambda module: None),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=list(CHANGES))
def test_changes_that_a_compiled_model_would_not_see_raise(change: Any, start: Start, archive: Path) -> None:
    model = start()
    with pytest.raises(FrozenModelError, match=r"no effect on what serves; .*load_model.*dtype:.*backends: \[eager\]"):
        change(model)
    assert torch.allclose(model(ROWS), eager_model(archive)(ROWS), atol=1e-5)


@pytest.mark.parametrize("name", ["load_state_dict", "hook", "a submodule", "load_state_dict of a module around it"])
def test_changes_of_an_eager_model_act_on_what_serves(name: str, start: Start, archive: Path) -> None:
    model, plain = start(backends=["eager"]), eager_model(archive)
    before = model(ROWS)
    torch.manual_seed(3)
    CHANGES[name](model)
    torch.manual_seed(3)
    CHANGES[name](plain)
    assert torch.equal(model(ROWS), plain(ROWS))
    assert not torch.equal(model(ROWS), before)


def test_casts_of_an_eager_model_act_on_what_serves() -> None:
    model = start_model(ModuleSource("m", torch.nn.Linear(4, 3)), Settings(backends=("eager",)))
    assert model.double()(ROWS.double()).dtype == torch.float64
    assert model.to(torch.float32)(ROWS).dtype == torch.float32
    assert model.weight.dtype == torch.float32


def test_what_changes_nothing_is_no_change(start: Start, archive: Path) -> None:
    model = start()
    assert model.to("cpu").eval().cpu().float().train(False).to("cpu", torch.float32) is model
    assert torch.nn.Sequential(model).to("cpu", torch.float32).eval()[0] is model
    model.class_names = ["cat", "dog"]  # a handler's own note
    assert model.class_names == ["cat", "dog"]
    assert hasattr(model, "load_state_dict")
    assert start(dtype="float32").float().outcome.backend == "aot_inductor"
    assert torch.allclose(model(ROWS), eager_model(archive)(ROWS), atol=1e-5)


def test_a_part_of_the_eager_module_is_given_with_a_warning(start: Start, caplog: pytest.LogCaptureFixture) -> None:
    model = start()
    assert model.layer.in_features == 4
    assert model.layer.out_features == 3
    assert [record.message for record in caplog.records if "does not serve" in record.message] == [
        "model: layer is that of the eager module, which does not serve; changes of it have no effect on answers"
    ]


def test_changes_while_answers_are_explained_act_on_the_eager_module(start: Start, archive: Path) -> None:
    model = start()
    with explanations():
        hook = model.register_forward_hook(lambda module, inputs, output: output * 0)
        assert not model(ROWS).detach().any()
        hook.remove()
        rows = ROWS.clone().requires_grad_()
        model(rows).sum().backward()
        assert rows.grad is not None
    with pytest.raises(FrozenModelError):
        CHANGES["hook"](model)
    assert torch.allclose(model(ROWS), eager_model(archive)(ROWS), atol=1e-5)


def test_declared_limits_hold_for_calls_of_another_form(start: Start) -> None:
    inputs = [{"name": "x", "dtype": "float32", "shape": ["batch", 4], "limits": [[0, 9]] * 4, "excludes": [7]}]
    model = start(inputs=inputs, backends=["eager"])
    assert model(ROWS.abs().double().clamp(max=6).float()).shape == (len(ROWS), 3)
    for value, message in ((-1.0, "inside its limits of column 2"), (7.0, "excluded")):
        rows = torch.ones(2, 4, dtype=torch.float64)
        rows[0, 2] = value
        with pytest.raises(InputError, match=message):
            model(rows)

"""Starts with plans that take weights and plans that do not: the key, the fallback, and what the refitter is given.

TensorRT itself is replaced at the backend's `build` and at the engine: no plan is built or run here.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.models import archive_source, eager_model, save_weights, settings_of, write_archive, write_weights
from ts_handlers import CompiledModel, start_model
from ts_handlers.backends.base import Built, Description, Target, Workspace
from ts_handlers.backends.tensorrt import backend as tensorrt
from ts_handlers.backends.tensorrt import library as tensorrt_library
from ts_handlers.backends.tensorrt import plan
from ts_handlers.backends.tensorrt.weights import compute, plan_weights, value_digest
from ts_handlers.errors import BuildError, MissError
from ts_handlers.execution.base import Loaded

REFIT = {
    "flags": ["REFIT_INDIVIDUAL"],
    "weights": [
        {"name": "w", "formula": "copy", "from": ["layer.weight"], "transposed": True, "dtype": "float32"},
        {"name": "b", "formula": "copy", "from": ["layer.bias"], "transposed": False, "dtype": "float32"},
    ],
    "state": {
        "layer.weight": {"dtype": "float32", "shape": [3, 4]},
        "layer.bias": {"dtype": "float32", "shape": [3]},
    },
    "tied": [],
    "fixed": {},
}
ROWS = torch.arange(8.0).reshape(2, 4)


class Plans:
    """What replaces TensorRT; `refused` is why it makes no plan that takes weights."""

    def __init__(self) -> None:
        self.refused: str | None = None
        self.error: Exception | None = None
        self.builds: list[bool] = []

    def build(self, backend: tensorrt.TensorRTBackend, target: Target, directory: Path) -> Built:
        refits = backend.refits(target)
        self.builds.append(refits)
        if self.error is not None:
            raise self.error
        torch.save(target.source.weights(), directory / plan.PLAN)
        if not refits:
            return Built({})
        return Built({"refit": REFIT if self.refused is None else tensorrt.refused(target, self.refused)})

    def load(self, target: Target, directory: Path, description: Description) -> Loaded:
        given = plan_weights(target, description)
        held = torch.load(directory / plan.PLAN, weights_only=True)
        weight = held["layer.weight"].t() if given is None else given["w"].reshape(4, 3)
        bias = held["layer.bias"] if given is None else given["b"]
        return Loaded(lambda tensors: tensors[0] @ weight + bias, target.require_signature())


@pytest.fixture
def plans(monkeypatch: pytest.MonkeyPatch) -> Plans:
    plans = Plans()

    def build(self: tensorrt.TensorRTBackend, target: Target, workspace: Workspace) -> Built:
        return plans.build(self, target, workspace.directory)

    def load(self: object, target: Target, directory: Path, description: Description) -> Loaded:
        return plans.load(target, directory, description)

    monkeypatch.setattr(tensorrt.TensorRTBackend, "build", build)
    monkeypatch.setattr(tensorrt.TensorRTBackend, "load", load)
    monkeypatch.setattr(tensorrt.TensorRTBackend, "toolchain", lambda self, request: "test")
    monkeypatch.setattr(tensorrt_library, "version", lambda flavour: f"{flavour}-0")
    return plans


@pytest.fixture
def archives(tmp_path: Path) -> list[Path]:
    """One model with two sets of weights."""
    folders = [write_archive(tmp_path / name) for name in ("first", "second")]
    write_weights(folders[1], seed=1)
    return folders


@pytest.fixture
def start(tmp_path: Path) -> Callable[..., CompiledModel]:
    def run(folder: Path, **changes: Any) -> CompiledModel:
        section = {"store": str(tmp_path / "s"), "backends": ["tensorrt", "eager"], "tensorrt": {"refit": True}}
        model = start_model(archive_source(folder), settings_of(**{**section, **changes}))
        with torch.inference_mode():
            assert torch.allclose(model(x=ROWS), eager_model(folder)(ROWS))
        return model

    return run


def test_other_weights_need_no_plan(plans: Plans, archives: list[Path], start: Callable[..., CompiledModel]) -> None:
    assert start(archives[0]).outcome.result == "built"
    other = start(archives[1], on_miss="fail", strict=True)
    assert other.outcome.result == "hit"
    assert other.outcome.canary is not None
    assert other.outcome.canary["source"] == "eager"  # nobody has seen these weights before
    again = start(archives[1], on_miss="fail")
    assert again.outcome.canary is not None
    assert again.outcome.canary["source"] == "record"
    assert plans.builds == [True]


@pytest.mark.parametrize("strict", [False, True])
def test_a_plan_that_takes_no_weights_is_found_by_them(
    plans: Plans, archives: list[Path], start: Callable[..., CompiledModel], strict: bool
) -> None:
    plans.refused = "a weight is folded"
    assert start(archives[0], strict=strict).outcome.fallbacks == ()
    other = start(archives[1], strict=strict)
    assert (other.outcome.backend, other.outcome.result) == ("tensorrt", "built")
    assert "cannot take other weights: a weight is folded" in other.outcome.fallbacks[0]["reason"]
    assert plans.builds == [True, False]
    for folder in archives:
        model = start(folder, on_miss="fail", strict=strict)
        assert (model.outcome.backend, model.outcome.result) == ("tensorrt", "hit")
    assert plans.builds == [True, False]
    # An archive without the setting shares the plan of its weights.
    assert start(archives[1], tensorrt={}, on_miss="fail").outcome.key == other.outcome.key
    third = archives[1].parent / "third"
    write_archive(third)
    write_weights(third, seed=2)
    with pytest.raises(MissError, match="missed: weights"):
        start(third, on_miss="fail", strict=strict)


def test_what_cannot_be_built_is_not_built_again_with_its_weights(
    plans: Plans, archives: list[Path], start: Callable[..., CompiledModel]
) -> None:
    plans.error = BuildError("no converter")
    assert start(archives[0]).outcome.backend == "eager"
    assert plans.builds == [True]


def test_weights_that_a_plan_answers_wrongly_get_a_plan_of_their_own(
    plans: Plans, archives: list[Path], start: Callable[..., CompiledModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    start(archives[0])
    wrong = [{**REFIT["weights"][0], "transposed": False}, REFIT["weights"][1]]  # type: ignore[index]
    load = plans.load

    def mistaken(target: Target, directory: Path, description: Description) -> Loaded:
        refit = description.get("refit")
        changed = description if refit is None else {**description, "refit": {**refit, "weights": wrong}}
        return load(target, directory, changed)

    monkeypatch.setattr(plans, "load", mistaken)
    other = start(archives[1])
    assert (other.outcome.backend, other.outcome.result) == ("tensorrt", "built")
    assert "CanaryError" in other.outcome.fallbacks[0]["reason"]
    assert plans.builds == [True, False]


@pytest.mark.parametrize(
    ("spoiled", "reason"),
    [
        ({"state": {"layer.weight": {"dtype": "float32", "shape": [4, 3]}}}, r"shape \[4, 3\], .* have \[3, 4\]"),
        ({"state": {"gone": {"dtype": "float32", "shape": [3]}}}, "'gone' of shape .* lack it"),
        ({"tied": [["layer.weight", "layer.bias"]]}, "are one tensor in the plan"),
        ({"fixed": {"layer.bias": value_digest(torch.zeros(3))}}, "'layer.bias' is not a floating-point weight"),
    ],
)
def test_weights_that_do_not_fit_get_a_plan_of_their_own(
    plans: Plans,
    archives: list[Path],
    start: Callable[..., CompiledModel],
    monkeypatch: pytest.MonkeyPatch,
    spoiled: dict[str, Any],
    reason: str,
) -> None:
    start(archives[0])
    load = plans.load

    def refusing(target: Target, directory: Path, description: Description) -> Loaded:
        refit = description.get("refit")
        return load(target, directory, description if refit is None else {"refit": {**refit, **spoiled}})

    monkeypatch.setattr(plans, "load", refusing)
    model = start(archives[1])
    assert (model.outcome.backend, model.outcome.result) == ("tensorrt", "built")
    import re

    assert re.search(reason, model.outcome.fallbacks[0]["reason"])
    monkeypatch.setattr(plans, "load", load)
    assert start(archives[0], on_miss="fail").outcome.fallbacks == ()  # the entry was not taken for a damaged one


def test_formulas_follow_batch_norm() -> None:
    torch.manual_seed(0)
    norm = torch.nn.BatchNorm1d(4).eval()
    with torch.no_grad():
        for value in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
            assert value is not None
            value.copy_(torch.rand(4) + 0.5)
    state = {name: value.detach() for name, value in norm.state_dict().items()}
    formula = {"eps": norm.eps, "dtype": "float32"}
    scale = compute({**formula, "formula": "batch_norm_scale", "from": ["weight", "running_var"]}, state)
    names = ["weight", "bias", "running_mean", "running_var"]
    shift = compute({**formula, "formula": "batch_norm_shift", "from": names}, state)
    x = torch.randn(5, 4)
    assert torch.allclose(x * scale + shift, norm(x), atol=1e-6)


def test_archives_with_mixed_precision_are_cast_as_the_model_is(tmp_path: Path, plans: Plans) -> None:
    folder = write_archive(tmp_path / "model")
    state = write_weights(folder, seed=3)
    save_weights(folder / "model.pt", {name: value.double() for name, value in state.items()})
    target = Target(archive_source(folder), settings_of(), torch.device("cpu"))
    given = plan_weights(target, {"refit": REFIT})
    assert given is not None
    assert torch.equal(given["w"].reshape(4, 3), state["layer.weight"].t())

"""A new artifact beside the eager model at several sizes; tests/startup/test_canary.py compares single outputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.models import archive_source, settings_of
from ts_handlers.backends.base import Target
from ts_handlers.backends.compare import compare_case, compare_sizes, eager_case
from ts_handlers.backends.eager import eager_run
from ts_handlers.errors import BuildError, CanaryError, InputError
from ts_handlers.execution.base import Loaded

CPU = torch.device("cpu")
SIZES = [{"batch": 1}, {"batch": 4}]


@pytest.fixture
def target(archive: Path) -> Target:
    return Target(archive_source(archive), settings_of(), CPU)


def artifact(target: Target, wrong_at: int | None = None, error: Exception | None = None) -> Loaded:
    """The eager model itself, but at one size."""
    eager = eager_run(target, target.require_signature().names)

    def run(tensors: list[torch.Tensor]) -> Any:
        if len(tensors[0]) == wrong_at:
            if error is not None:
                raise error
            return eager(tensors) * 1.5
        return eager(tensors)

    return Loaded(run, target.require_signature())


def test_what_agrees_at_every_size_passes(target: Target) -> None:
    compare_sizes(target, artifact(target), SIZES)


def test_the_size_that_differs_is_named(target: Target) -> None:
    with pytest.raises(BuildError, match=r"at {'batch': 4} the plan differs from eager: output 0: relative error 0\.5"):
        compare_sizes(target, artifact(target, 4), SIZES, what="plan")


@pytest.mark.parametrize("error", [RuntimeError("no\nkernel"), InputError("no kernel")])
def test_a_run_that_fails_differs(error: Exception, target: Target) -> None:
    with pytest.raises(BuildError, match=r"at {'batch': 1} the artifact differs from eager: no kernel"):
        compare_sizes(target, artifact(target, 1, error), SIZES)


def test_an_error_of_eager_itself_is_not_the_artifacts(target: Target) -> None:
    def eager(tensors: list[torch.Tensor]) -> Any:
        raise RuntimeError("the model is at fault")

    with pytest.raises(RuntimeError, match="the model is at fault"):
        compare_sizes(target, artifact(target), SIZES, eager=eager)


def test_another_eager_can_be_compared_with(target: Target) -> None:
    with pytest.raises(BuildError, match=r"relative error 0\.5"):
        compare_sizes(target, artifact(target), SIZES, eager=lambda tensors: artifact(target).run(tensors) / 1.5)


def test_a_case_keeps_its_outputs_when_its_inputs_change(target: Target) -> None:
    case = eager_case(lambda tensors: (tensors[0], 7, "text"), target.require_signature(), {"batch": 2}, 0, CPU)
    expected = case.outputs[0].clone()
    case.inputs[0].zero_()
    assert torch.equal(case.outputs[0], expected)
    assert (case.sizes, case.constants) == ({"batch": 2}, ["7", '"text"'])
    with pytest.raises(CanaryError, match="constants: expected 7"):
        compare_case(lambda tensors: (expected, 8, "text"), case, CPU, None)

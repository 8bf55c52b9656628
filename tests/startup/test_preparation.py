"""The order in which an artifact's `run` is wrapped: slots inside, limits outside, and no limits for requests."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ts_handlers.execution.base import Loaded, Run
from ts_handlers.execution.slots import ModuleSlots
from ts_handlers.model.signature import Signature
from ts_handlers.settings import Dimension, InputSpec
from ts_handlers.settings.sections import ContextSettings
from ts_handlers.startup.preparation import prepare

TENSORS = [torch.zeros(1, 4)]


class Watched:
    """An artifact, its slots, and what runs in which order."""

    def __init__(self) -> None:
        self.order: list[str] = []
        self.slots = ModuleSlots(ContextSettings(count=1), torch.device("cpu"))
        inputs = (InputSpec("x", "float32", ("batch", 4)),)
        self.signature = Signature(inputs, {"batch": Dimension(1, 8)})
        self.loaded = Loaded(self.run, self.signature, adjusts_threads=True)

    def run(self, tensors: list[torch.Tensor]) -> str:
        self.order.append(f"run, {self.in_use()} slot in use")
        return "output"

    def around(self, run: Run) -> Run:
        def limited(tensors: list[torch.Tensor]) -> Any:
            self.order.append(f"limits on, {self.in_use()} slots in use")
            try:
                return run(tensors)
            finally:
                self.order.append("limits off")

        return limited

    def in_use(self) -> int:
        return self.slots.pool.stats().in_use


@pytest.fixture
def watched() -> Watched:
    return Watched()


def test_checks_run_in_a_slot_inside_the_limits(watched: Watched) -> None:
    prepared = prepare(watched.loaded, None, watched.slots, watched.around)
    assert prepared.checked.run(TENSORS) == "output"
    assert watched.order == ["limits on, 0 slots in use", "run, 1 slot in use", "limits off"]
    assert watched.in_use() == 0


def test_requests_run_in_a_slot_and_under_no_limits(watched: Watched) -> None:
    prepared = prepare(watched.loaded, None, watched.slots, watched.around)
    assert prepared.served.run(TENSORS) == "output"
    assert watched.order == ["run, 1 slot in use"]


def test_without_limits_checks_and_requests_run_the_same(watched: Watched) -> None:
    prepared = prepare(watched.loaded, None, watched.slots)
    assert prepared.checked is prepared.served


@pytest.mark.parametrize("yields", [False, True])
def test_threads_stay_as_they_are_beside_a_model_that_serves(yields: bool, watched: Watched) -> None:
    prepared = prepare(watched.loaded, None, watched.slots, watched.around, yields=yields)
    assert prepared.served.adjusts_threads
    assert prepared.checked.adjusts_threads != yields


def test_an_artifact_gets_the_limits_of_values_that_are_declared_now(watched: Watched) -> None:
    spec = InputSpec("x", "float32", ("batch", 4), limits=(0, 5))
    declared = Signature((spec,), watched.signature.dimensions)
    prepared = prepare(watched.loaded, declared, watched.slots, watched.around)
    for form in (prepared.served, prepared.checked):
        assert form.signature.inputs[0].limits == (0, 5)
    assert watched.loaded.signature.inputs[0].limits is None

"""The canary's comparison of outputs."""

from __future__ import annotations

import dataclasses
import os

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.support.subprocesses import start_python
from ts_handlers.backends.compare import TOLERANCES, compare_outputs, relative_error
from ts_handlers.errors import CanaryError
from ts_handlers.execution.base import Loaded
from ts_handlers.model.signature import Signature
from ts_handlers.startup import warmup

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_tolerance_fits_the_dtype(dtype: torch.dtype) -> None:
    expected = torch.linspace(1, 2, 100, dtype=torch.float64)
    limit = TOLERANCES[dtype]
    assert compare_outputs(expected.to(dtype), expected.to(dtype)) == 0
    if dtype in (torch.float32, torch.float64):
        compare_outputs((expected * (1 + limit / 2)).to(dtype), expected.to(dtype))
    with pytest.raises(CanaryError, match="relative error"):
        compare_outputs((expected * (1 + limit * 3)).to(dtype), expected.to(dtype))


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ([1.0, NAN], [1.0, 2.0]),
        ([1.0, 2.0], [1.0, NAN]),
        ([INF, 1.0], [1.0, 1.0]),
        ([INF, 1.0], [-INF, 1.0]),
        ([NAN, NAN], [1.0, 1.0]),
        ([0.0, 0.0], [1.0, 1.0]),
        ([1e-3], [0.0]),
    ],
)
def test_what_differs_is_refused(found: list[float], expected: list[float]) -> None:
    with pytest.raises(CanaryError):
        compare_outputs(torch.tensor(found), torch.tensor(expected), 1e-4)


def test_equal_special_values_are_equal() -> None:
    values = torch.tensor([NAN, INF, -INF, 1.0])
    assert relative_error(values, values.clone()) == 0


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (torch.zeros(2), torch.zeros(3)),
        (torch.zeros(2), torch.zeros(2, 1)),
        (torch.zeros(2), torch.zeros(2).double()),
        (torch.tensor([1]), torch.tensor([2])),
        (torch.tensor([True]), torch.tensor([False])),
        ((torch.zeros(1),), (torch.zeros(1), torch.zeros(1))),
    ],
)
def test_shapes_dtypes_numbers_and_integers_must_be_equal(found: object, expected: object) -> None:
    with pytest.raises(CanaryError):
        compare_outputs(found, expected, 1.0)


@given(st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=8), st.floats(1e-6, 1))
def test_error_is_relative_to_the_expected_norm(values: list[float], scale: float) -> None:
    expected = torch.tensor(values, dtype=torch.float64)
    error = relative_error(expected * (1 + scale), expected)
    assert error == pytest.approx(scale, rel=1e-3)


def test_empty_and_complex_outputs() -> None:
    assert compare_outputs(torch.zeros(0, 3), torch.zeros(0, 3)) == 0
    value = torch.tensor([1 + 2j])
    assert compare_outputs(value, value.clone()) == 0
    with pytest.raises(CanaryError):
        compare_outputs(value.conj(), value)


@pytest.mark.parametrize(("idle", "expected"), [(-3, 1), (0, 1), (1, 1), (2, 2), (3, 3), (64, 3)])
def test_canary_runs_on_the_idle_processors(idle: int, expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warmup, "idle_processors", lambda: idle)
    loaded = Loaded(run=lambda tensors: None, signature=Signature((), {}), adjusts_threads=True)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with warmup.few_threads(loaded):
            assert torch.get_num_threads() == expected
        assert torch.get_num_threads() == 3
        with warmup.few_threads(dataclasses.replace(loaded, adjusts_threads=False)):
            assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


@pytest.mark.processes
def test_running_processes_are_not_idle_processors() -> None:
    before = len(os.sched_getaffinity(0))
    assert warmup.idle_processors() <= before
    spinning = [start_python("print('on', flush=True)\nwhile True: pass") for _ in range(before)]
    try:
        for process in spinning:
            assert process.stdout is not None
            process.stdout.readline()
        assert warmup.idle_processors() <= 0
    finally:
        for process in spinning:
            process.kill()
            process.wait()

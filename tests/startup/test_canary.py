"""The canary's comparison of outputs."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ts_handlers.backends.compare import TOLERANCES, compare_outputs, relative_error
from ts_handlers.errors import CanaryError

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

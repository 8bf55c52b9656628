"""Values that are limited for each column or excluded: what is accepted, what is drawn, and what settings may say."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.support.models import settings_of
from ts_handlers.errors import InputError, SettingsError
from ts_handlers.model.sampling import KINDS
from ts_handlers.model.signature import Signature

COLUMNS = [[0, 10], [0, 24], [0, 7]]
CPU = torch.device("cpu")


def declared(dtype: str = "int64", **changes: Any) -> Signature:
    section = {
        "inputs": [{"name": "x", "dtype": dtype, "shape": ["batch", 3], **changes}],
        "dimensions": {"batch": {"min": 1, "max": 64}},
    }
    settings = settings_of(section)
    return Signature(settings.inputs, settings.dimensions)


def accepts(signature: Signature, *values: float, dtype: torch.dtype = torch.int64) -> bool:
    try:
        signature.bind([torch.tensor([values], dtype=dtype)], {}, CPU)
    except InputError:
        return False
    return True


def test_each_column_has_its_own_range() -> None:
    signature = declared(limits=COLUMNS)
    assert accepts(signature, 9, 23, 6)
    assert not accepts(signature, 9, 23, 7)
    assert not accepts(signature, 10, 0, 0)
    assert not accepts(signature, 0, -1, 0)
    with pytest.raises(InputError, match=r"limits of column 1 \[0, 24\), found 24"):
        signature.bind([torch.tensor([[0, 24, 0]])], {}, CPU)
    with pytest.raises(InputError, match="3 columns"):  # with `outside: eager` nobody else would refuse it
        signature.bind([torch.tensor([[0, 1]])], {}, CPU)


def test_open_ends_and_nan() -> None:
    signature = declared("float32", limits=[[None, 1], [0, None], [-1, 1]])
    assert accepts(signature, -9, 9, 0, dtype=torch.float32)
    assert not accepts(signature, 0, 0, float("nan"), dtype=torch.float32)


def test_excluded_values_are_refused() -> None:
    assert accepts(declared(excludes=[0]), 1, -1, 2)
    with pytest.raises(InputError, match="'x': found 0, which is excluded"):
        declared(excludes=[0]).bind([torch.tensor([[1, 0, 2]])], {}, CPU)
    assert not accepts(declared("float32", excludes=[0, 0.5]), 1, 0.5, 2, dtype=torch.float32)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "changes",
    [
        {"limits": COLUMNS},
        {"excludes": [0]},
        {"limits": [0, 3], "excludes": [0, 1]},
        {"dtype": "float32", "excludes": [0, 1]},
        {"dtype": "float16", "limits": [[0, 1], [5, 6], [-1, 1]]},
        {"dtype": "float32", "values": [2, 3]},
        {"dtype": "bool"},
    ],
)
def test_what_is_drawn_is_accepted(kind: str, changes: dict[str, Any]) -> None:
    signature = declared(**changes)
    signature.kind = kind
    for seed in range(5):
        (drawn,) = signature.bind(signature.generate({"batch": 32}, seed=seed), {}, CPU)
        assert drawn.shape == (32, 3)
        assert drawn.isfinite().all()


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"limits": COLUMNS[:2]}, ["inputs[0].limits", "(3)", "2 ranges"]),
        ({"limits": [*COLUMNS[:2], [3, 3]]}, ["inputs[0].limits[2]", "[3, 3]"]),
        ({"limits": [1]}, ["inputs[0].limits", "two numbers"]),
        ({"limits": [0, [0, 1]]}, ["inputs[0].limits", "two numbers"]),
        ({"limits": COLUMNS, "values": [0, 9]}, ["inputs[0].values", "limits[2]"]),
        ({"excludes": [0, 1]}, ["inputs[0].excludes", "leaves nothing"]),
        ({"excludes": [float("inf")]}, ["inputs[0].excludes", "inf"]),
        ({"dtype": "int8", "excludes": [1000]}, ["inputs[0].excludes", "1000", "int8"]),
        ({"excludes": 0}, ["inputs[0].excludes"]),
    ],
)
def test_settings_that_are_refused(changes: dict[str, Any], parts: list[str]) -> None:
    with pytest.raises(SettingsError) as error:
        declared(**changes)
    for part in parts:
        assert part in str(error.value)


def test_neither_is_in_the_key() -> None:
    assert declared(limits=COLUMNS, excludes=[3]).canonical() == declared().canonical()


def test_they_are_those_of_the_settings_at_hand() -> None:
    other = declared().with_values_of(declared(limits=COLUMNS, excludes=[3]))
    assert accepts(other, 1, 1, 1)
    assert not accepts(other, 1, 3, 1)
    assert not accepts(other, 1, 1, 7)

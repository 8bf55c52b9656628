"""What the `values` and `limits` of an input say: ranges for all of it or for each column, and what is drawn from."""

from __future__ import annotations

import math
from typing import cast

from ts_handlers.settings.dtypes import INTEGERS, VALUES, Number, Range
from ts_handlers.settings.model import InputSpec


def column_limits(spec: InputSpec) -> tuple[Range, ...] | None:
    """The ranges of each column of the last dimension; None when `limits` is one range for all, or nothing.

    Examples
    --------
    >>> column_limits(InputSpec("day", "int64", ("batch", 2), limits=((0, 24), (0, 7))))
    ((0, 24), (0, 7))
    """
    if spec.limits is None or not all(isinstance(bound, tuple) for bound in spec.limits):
        return None
    return cast("tuple[Range, ...]", spec.limits)


def whole_limits(spec: InputSpec) -> Range | None:
    """The one range of `limits`; None when there is one for each column, or nothing.

    Examples
    --------
    >>> whole_limits(InputSpec("ids", "int64", (4,), limits=(0, 30522)))
    (0, 30522)
    """
    return None if column_limits(spec) is not None else cast("Range | None", spec.limits)


def values_to_draw(spec: InputSpec) -> tuple[Number, Number] | None:
    """The range ``[low, high)`` from which an input is drawn, in integers for one of integers; None for a standard
    normal distribution.

    Only of `values` and of one range for all; columns are drawn one by one. Where `limits` leaves an end open, the
    range is one that holds at least two integers.

    Examples
    --------
    >>> values_to_draw(InputSpec("ids", "int64", (4,), limits=(0, 30522)))
    (0, 30522)
    >>> values_to_draw(InputSpec("ids", "int64", (4,), limits=(5, None)))
    (5, 10)
    >>> values_to_draw(InputSpec("mask", "int64", (4,)))
    (0, 2)
    """
    integers = spec.dtype in INTEGERS
    if spec.values is not None:
        low, high = spec.values
        return (math.ceil(low), math.ceil(high)) if integers else (low, high)
    limits = whole_limits(spec)
    if limits is None:
        return (0, 2) if integers else None
    lower, upper = limits
    if lower is None:
        lower = 0 if upper is None else min(0, upper - max(2, abs(upper)))
    if upper is None:
        upper = max(2, lower + max(2, abs(lower)))
    least, most = VALUES[spec.dtype]
    if integers:
        lower, upper = math.ceil(lower), math.ceil(upper)
    return max(lower, least), min(upper, most)

"""The range of values that warm-up and canary draw for an input, from its `values` and `limits`."""

from __future__ import annotations

import math

from ts_handlers.settings.dtypes import INTEGERS, VALUES, Number
from ts_handlers.settings.model import InputSpec


def values_to_draw(spec: InputSpec) -> tuple[Number, Number] | None:
    """The range ``[low, high)`` from which an input is drawn, in integers for one of integers; None for a standard
    normal distribution.

    Where `limits` leaves an end open, the range is one that holds at least two integers.

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
    if spec.limits is None:
        return (0, 2) if integers else None
    lower, upper = spec.limits
    if lower is None:
        lower = 0 if upper is None else min(0, upper - max(2, abs(upper)))
    if upper is None:
        upper = max(2, lower + max(2, abs(lower)))
    least, most = VALUES[spec.dtype]
    if integers:
        lower, upper = math.ceil(lower), math.ceil(upper)
    return max(lower, least), min(upper, most)

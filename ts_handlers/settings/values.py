"""The range of values that warm-up and canary draw for an input, from its `values` and `limits`."""

from __future__ import annotations

import math

from ts_handlers.settings.model import InputSpec, Number

_FLOATS = {"float64": 1.7e308, "float32": 3.4e38, "float16": 65504.0, "bfloat16": 3.38e38}
_ENDS: dict[str, tuple[Number, Number]] = {
    "int64": (-(2**63), 2**63 - 1),  # one less than there are: torch draws no larger end
    "int32": (-(2**31), 2**31),
    "int16": (-(2**15), 2**15),
    "int8": (-(2**7), 2**7),
    "uint8": (0, 2**8),
    "bool": (0, 2),
    **{name: (-largest, largest) for name, largest in _FLOATS.items()},
}


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
    integers = spec.dtype not in _FLOATS
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
    least, most = _ENDS[spec.dtype]
    if integers:
        lower, upper = math.ceil(lower), math.ceil(upper)
    return max(lower, least), min(upper, most)

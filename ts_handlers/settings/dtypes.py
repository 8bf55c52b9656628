"""The dtypes that settings can name, with the values that each can hold."""

from __future__ import annotations

from typing import Literal, get_args

FloatDtype = Literal["float64", "float32", "float16", "bfloat16"]
IntegerDtype = Literal["int64", "int32", "int16", "int8", "uint8", "bool"]
DtypeName = FloatDtype | IntegerDtype
"""torch's name of a dtype: ``getattr(torch, name)``."""
Number = int | float  # `float` alone would round large integers
Range = tuple[Number | None, Number | None]
"""``[low, high)``, None for an open end."""

FLOATS: tuple[FloatDtype, ...] = get_args(FloatDtype)
INTEGERS: tuple[IntegerDtype, ...] = get_args(IntegerDtype)
DTYPES: tuple[DtypeName, ...] = (*FLOATS, *INTEGERS)

_LARGEST: dict[FloatDtype, float] = {"float64": 1.7e308, "float32": 3.4e38, "float16": 65504.0, "bfloat16": 3.38e38}
VALUES: dict[DtypeName, tuple[Number, Number]] = {
    "int64": (-(2**63), 2**63 - 1),  # one less than there are: torch draws no larger end
    "int32": (-(2**31), 2**31),
    "int16": (-(2**15), 2**15),
    "int8": (-(2**7), 2**7),
    "uint8": (0, 2**8),
    "bool": (0, 2),
    **{name: (-largest, largest) for name, largest in _LARGEST.items()},
}
"""The values ``[low, high)`` from which an input of each dtype can be drawn."""

"""Refuses values of a request that the declared `limits` and `excludes` of its inputs rule out."""

from __future__ import annotations

import torch

from ts_handlers.errors import InputError
from ts_handlers.settings import DTYPES, InputSpec
from ts_handlers.settings.dtypes import Number, Range
from ts_handlers.settings.values import column_limits, whole_limits

_ORDERED = {getattr(torch, name) for name in DTYPES}
_WHERE = "handler.ts_handlers.inputs of model-config.yaml"


def check_values(spec: InputSpec, tensor: torch.Tensor) -> None:
    """Check one input of a call, on the device where it lies.

    Parameters
    ----------
    spec:
        The declared input, with `limits` or `excludes`.
    tensor:
        Of any shape and dtype.

    Raises
    ------
    InputError
        A value is below its range, not below the end of it, not a number, or excluded.
    """
    if tensor.dtype not in _ORDERED:
        raise InputError(f"input {spec.name!r}: expected real numbers, found {str(tensor.dtype)[6:]}")
    columns, whole = column_limits(spec), whole_limits(spec)
    if columns is not None and (not tensor.dim() or tensor.shape[-1] != len(columns)):
        raise InputError(
            f"input {spec.name!r}: expected {len(columns)} columns, one for each of its limits, found the shape "
            f"{list(tensor.shape)}"
        )
    if not tensor.numel():
        return
    if whole is not None:
        ends = tensor.aminmax()
        least, most = torch.stack(ends).tolist() if tensor.is_cuda else (ends[0].item(), ends[1].item())
        _check_range(spec.name, "", least, most, whole)
    if columns is not None:
        rows = tensor.reshape(-1, len(columns))
        rows = rows.to(torch.uint8) if rows.dtype == torch.bool else rows
        lows, highs = torch.stack(rows.aminmax(dim=0)).tolist()
        for index, (limits, least, most) in enumerate(zip(columns, lows, highs, strict=True)):
            _check_range(spec.name, f" of column {index}", least, most, limits)
    for excluded in spec.excludes:
        if (tensor == excluded).any():
            raise InputError(
                f"input {spec.name!r}: found {excluded}, which is excluded; excluded values are declared in {_WHERE}"
            )


def _check_range(name: str, column: str, least: Number, most: Number, limits: Range) -> None:
    low, high = limits
    # NaN, which `aminmax` hands on, fails every comparison.
    if (low is None or low <= least) and (high is None or most < high):
        return
    found = most if low is None or low <= least else least
    shown = ", ".join("null" if bound is None else f"{bound}" for bound in limits)
    raise InputError(
        f"input {name!r}: expected values inside its limits{column} [{shown}), found {found}; the limits are declared "
        f"in {_WHERE}, or are the size of the table that the model looks up"
    )

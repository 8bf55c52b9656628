"""Tensors from and to JSON, as `ts_handlers.handler.CompiledHandler` speaks it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import torch

from ts_handlers.errors import InputError
from ts_handlers.settings import InputSpec


def read_tensors(body: Any, specs: Sequence[InputSpec]) -> dict[str, torch.Tensor]:
    """The tensors of one request by name, in the declared dtypes.

    Parameters
    ----------
    body:
        JSON as text, bytes or already parsed: an object with every declared input, or the bare value of the only one.
    specs:
        The declared inputs.

    Raises
    ------
    InputError
        The body is something else, or a value does not fit its dtype.
    """
    if isinstance(body, (bytes, bytearray, str)):
        try:
            body = json.loads(body)
        except RecursionError as error:
            raise InputError("the request is nested too deeply") from error
    if not isinstance(body, dict):
        if len(specs) != 1:
            names = ", ".join(spec.name for spec in specs)
            raise InputError(f"expected a JSON object with the inputs {names}, found {type(body).__name__}")
        body = {specs[0].name: body}
    unknown = sorted(set(body) - {spec.name for spec in specs})
    if unknown:
        raise InputError(f"unknown input {unknown[0]!r}; expected {', '.join(spec.name for spec in specs)}")
    row = {}
    for spec in specs:
        if spec.name not in body:
            raise InputError(f"input {spec.name!r} is missing")
        dtype = getattr(torch, spec.dtype)
        value = body[spec.name]
        try:
            tensor = value if isinstance(value, torch.Tensor) else torch.tensor(value)
        except (TypeError, ValueError, RuntimeError) as error:
            raise InputError(f"input {spec.name!r} is not a nested list of numbers: {error}") from error
        if tensor.is_floating_point() and not dtype.is_floating_point and tensor.numel():
            raise InputError(f"input {spec.name!r}: expected {spec.dtype} values, found fractions")
        row[spec.name] = tensor.to(dtype)
        if not dtype.is_floating_point and not torch.equal(row[spec.name].to(tensor.dtype), tensor):
            raise InputError(f"input {spec.name!r}: a value does not fit {spec.dtype}")
    return row


def rows_of(value: Any, start: int, stop: int) -> Any:
    """The rows ``start`` to ``stop - 1`` of an output, in its structure, tensors as nested lists."""
    if isinstance(value, torch.Tensor):
        return value[start:stop].tolist() if value.dim() else value.tolist()
    if hasattr(value, "keys"):
        return {key: rows_of(value[key], start, stop) for key in value}
    if isinstance(value, (tuple, list)):
        return [rows_of(item, start, stop) for item in value]
    return value

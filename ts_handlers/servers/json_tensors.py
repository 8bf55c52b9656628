"""Tensors from and to JSON: read a request's inputs, join requests into a batch, split the output again.

For any server. A request has a row for each of its samples: dimension 0 of each input and output.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Sequence
from typing import Any

import torch

from ts_handlers.errors import InputError, bounded, shown
from ts_handlers.model.signature import row_dimension
from ts_handlers.settings import InputSpec

NOT_BY_ROW = "the model's inputs or outputs do not have a row for each row of a request; it is answered alone"

DEPENDENT_ROWS = "a row's answer is not known to be the same alone and among the rows of others; it is answered alone"
NON_FINITE = (
    "the model's answer holds NaN or infinity, which JSON does not have; send other values, or let the server answer "
    "null with handler.ts_handlers.non_finite: null in model-config.yaml"
)


def read_tensors(body: Any, specs: Sequence[InputSpec]) -> dict[str, torch.Tensor]:
    """The tensors of one request.

    Parameters
    ----------
    body:
        JSON as text, bytes or already parsed: an object with every declared input, or the bare value of the only one.
    specs:
        The declared inputs.

    Returns
    -------
    For each input's name a tensor on the CPU, of the declared dtype and the shape of the nested list; whether that fits
    the declared shape is not checked here.

    Raises
    ------
    InputError
        The body is something else, or a value does not fit its dtype.
    ValueError
        It is no JSON.
    """
    if isinstance(body, (bytes, bytearray, str)):
        try:
            body = json.loads(body, parse_constant=_refuse_constant)
        except RecursionError as error:
            raise InputError("the request is nested too deeply") from error
    if not isinstance(body, dict):
        if len(specs) != 1:
            names = ", ".join(spec.name for spec in specs)
            raise InputError(f"expected a JSON object with the inputs {names}, found {type(body).__name__}")
        body = {specs[0].name: body}
    unknown = set(body) - {spec.name for spec in specs}
    if unknown:
        raise InputError(f"unknown input {shown(min(unknown))}; expected {', '.join(spec.name for spec in specs)}")
    row = {}
    for spec in specs:
        if spec.name not in body:
            raise InputError(f"input {spec.name!r} is missing")
        row[spec.name] = _read_tensor(body[spec.name], spec)
    return row


def _refuse_constant(text: str) -> Any:
    raise InputError(f"the request holds {text}, which JSON does not have; send finite numbers")


def _read_tensor(value: Any, spec: InputSpec) -> torch.Tensor:
    """One input in its declared dtype; no value is rounded or wrapped to fit an integer dtype, or becomes infinite."""
    dtype = getattr(torch, spec.dtype)
    try:
        tensor = value if isinstance(value, torch.Tensor) else torch.tensor(value)
        if dtype == torch.float64 and tensor.is_floating_point():
            tensor = torch.as_tensor(value, dtype=dtype)  # without a detour through float32
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:  # the last: an integer beyond every float
        raise InputError(f"input {spec.name!r} is not a nested list of numbers: {bounded(error)}") from error
    if tensor.is_floating_point() and not dtype.is_floating_point and tensor.numel():
        raise InputError(f"input {spec.name!r}: expected {spec.dtype} values, found fractions")
    found: torch.Tensor = tensor.to(dtype)
    if not dtype.is_floating_point and not torch.equal(found.to(tensor.dtype), tensor):
        raise InputError(f"input {spec.name!r}: a value does not fit {spec.dtype}")
    if dtype.is_floating_point and not found.isfinite().all():
        exact = torch.as_tensor(value, dtype=torch.float64)  # float32, as which it was read, may have been too small
        first = exact[~found.isfinite()].reshape(-1)[0].item()
        if math.isfinite(first):
            raise InputError(f"input {spec.name!r}: the value {first:.6g} does not fit {spec.dtype}")
        raise InputError(f"input {spec.name!r}: expected finite numbers, found {first}, which JSON does not have")
    return found


def rows_of(value: Any, start: int | None = None, stop: int | None = None) -> Any:
    """The rows ``start`` to ``stop - 1`` of an output, or all of it, JSON-compatible.

    Parameters
    ----------
    value:
        Tensors of shape ``(rows, ...)``, or of any shape when `start` is None; in tuples, lists and mappings.
    start, stop:
        Of dimension 0.

    Returns
    -------
    The same structure with nested lists in place of tensors, lists in place of tuples, and None in place of NaN and
    infinity, which JSON does not have.

    Examples
    --------
    >>> rows_of({"y": torch.arange(6).reshape(3, 2)}, 0, 2)
    {'y': [[0, 1], [2, 3]]}
    """
    if isinstance(value, torch.Tensor):
        rows = value if start is None else value[start:stop]
        finite = not rows.is_floating_point() or bool(rows.isfinite().all())
        return rows.tolist() if finite else _without_non_finite(rows.tolist())
    if isinstance(value, float):
        return _without_non_finite(value)
    if hasattr(value, "keys"):
        return {key: rows_of(value[key], start, stop) for key in value}
    if isinstance(value, (tuple, list)):
        return [rows_of(item, start, stop) for item in value]
    return value


def _without_non_finite(value: Any) -> Any:
    if isinstance(value, list):
        return [_without_non_finite(item) for item in value]
    return value if math.isfinite(value) else None


def is_finite(value: Any) -> bool:
    """Whether an output holds neither NaN nor infinity.

    Examples
    --------
    >>> is_finite({"y": torch.zeros(2)}), is_finite((torch.zeros(2) / 0, "text"))
    (True, False)
    """
    if isinstance(value, torch.Tensor):
        return not value.is_floating_point() or bool(value.isfinite().all())
    if isinstance(value, float):
        return math.isfinite(value)
    if hasattr(value, "keys"):
        return all(is_finite(value[key]) for key in value)
    if isinstance(value, (tuple, list)):
        return all(map(is_finite, value))
    return True


def is_by_row(value: Any, rows: int) -> bool:
    """Whether an output for `rows` rows can be split: each tensor in it has the shape ``(rows, ...)``."""
    if isinstance(value, torch.Tensor):
        return value.dim() > 0 and value.shape[0] == rows
    if hasattr(value, "keys"):
        return all(is_by_row(value[key], rows) for key in value)
    if isinstance(value, (tuple, list)):
        return all(is_by_row(item, rows) for item in value)
    return value is None or isinstance(value, (str, bool))


def have_rows(specs: Sequence[InputSpec]) -> bool:
    """Whether dimension 0 is the same dynamic dimension in every input, so that requests can be joined along it."""
    return row_dimension(specs) is not None


def join_rows(
    rows: Sequence[dict[str, torch.Tensor]], specs: Sequence[InputSpec]
) -> tuple[dict[str, torch.Tensor], list[int]]:
    """The inputs of a batch: those of one request, or of several joined along dimension 0.

    Parameters
    ----------
    rows:
        The tensors of each request by name, of shape ``(rows of the request, ...)``; see `read_tensors`.
    specs:
        The declared inputs. For more than one request `have_rows` must hold.

    Returns
    -------
    For each name a tensor of shape ``(sum of rows, ...)``, and the number of rows of each request.

    Raises
    ------
    InputError
        A request's inputs have different numbers of rows, or requests differ in their other dimensions; each has to be
        answered alone.
    """
    if len(rows) == 1:
        first = rows[0][specs[0].name]
        return rows[0], [first.shape[0] if first.dim() else 1]
    counts = []
    for row in rows:
        sizes = {name: tensor.shape[0] if tensor.dim() else None for name, tensor in row.items()}
        (size, *others) = set(sizes.values())
        if others or size is None:
            raise InputError(f"the request's inputs have different numbers of rows: {sizes}")
        counts.append(size)
    if len({tuple(tensor.shape[1:] for tensor in row.values()) for row in rows}) > 1:
        raise InputError("the requests of this batch have different shapes")
    return {spec.name: torch.cat([row[spec.name] for row in rows]) for spec in specs}, counts


def split_rows(value: Any, counts: Sequence[int]) -> list[Any] | None:
    """Split the output of a batch into the answers of its requests.

    Parameters
    ----------
    value:
        The model's output: tensors of shape ``(sum(counts), ...)`` of any dtype, in tuples, lists and mappings.
    counts:
        The number of rows of each request, as of `join_rows`.

    Returns
    -------
    For each request the structure of the output with its own rows, tensors as nested lists; None when a tensor in the
    output has another number of rows.

    Examples
    --------
    >>> split_rows((torch.tensor([1, 2, 3]), None), [1, 2])
    [[[1], None], [[2, 3], None]]
    """
    if not is_by_row(value, sum(counts)):
        return None
    ends = list(itertools.accumulate(counts))
    return [rows_of(value, end - count, end) for count, end in zip(counts, ends, strict=True)]

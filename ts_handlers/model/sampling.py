"""Draws the inputs on which a model is tried, compared and warmed up when nobody has given samples.

Random inputs can be ones that the plain model itself refuses: boxes whose ends are swapped, indices of several tables
with one range. `KINDS` lists what is tried instead, in this order; all kinds keep to `values`, `limits` and `excludes`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import msgspec
import torch

from ts_handlers.settings import InputSpec
from ts_handlers.settings.dtypes import INTEGERS, VALUES
from ts_handlers.settings.values import column_limits, values_to_draw

RANDOM = "random"
SMALL = "small"
KINDS = (RANDOM, "ramp", SMALL, "ones", "zeros")
"""``ramp`` rises along the last dimension, ``small`` takes the beginning of the range."""


def draw(spec: InputSpec, shape: Sequence[int], generator: torch.Generator, kind: str = RANDOM) -> torch.Tensor:
    """One input of a given shape, on the CPU, in its declared dtype.

    Parameters
    ----------
    spec:
        The declared input.
    shape:
        Its shape, without names of dimensions.
    generator:
        Where the random numbers come from.
    kind:
        One of `KINDS`.

    Examples
    --------
    >>> spec = InputSpec("boxes", "int64", (2, 4), limits=(0, 640))
    >>> draw(spec, (2, 4), torch.Generator(), "ramp").diff().min().item() > 0
    True
    """
    columns = column_limits(spec)
    if columns is not None:
        alone = [msgspec.structs.replace(spec, shape=tuple(shape[:-1]), limits=limits) for limits in columns]
        return torch.stack([draw(column, column.shape, generator, kind) for column in alone], -1)  # type: ignore[arg-type]
    drawn = _random(spec, shape, generator) if kind == RANDOM else _of_kind(spec, shape, generator, kind)
    for excluded in spec.excludes:
        drawn[drawn == excluded] = _beside(spec, excluded)
    return drawn


def _random(spec: InputSpec, shape: Sequence[int], generator: torch.Generator) -> torch.Tensor:
    dtype = getattr(torch, spec.dtype)
    drawn_from = values_to_draw(spec)
    if drawn_from is None:
        return torch.randn(shape, generator=generator).to(dtype)
    if dtype.is_floating_point:
        return _uniform(shape, *drawn_from, dtype, generator)
    low, high = map(int, drawn_from)
    return torch.randint(low, high, tuple(shape), generator=generator).to(dtype)


def _of_kind(spec: InputSpec, shape: Sequence[int], generator: torch.Generator, kind: str) -> torch.Tensor:
    dtype = getattr(torch, spec.dtype)
    low, high = values_to_draw(spec) or (-1.0, 1.0)
    if kind == SMALL and dtype.is_floating_point:
        return _uniform(shape, low, low + (high - low) / 100, dtype, generator)
    if kind == SMALL:
        return torch.randint(int(low), min(int(low) + 2, int(high)), tuple(shape), generator=generator).to(dtype)
    if kind == "ramp":
        count = shape[-1] if shape else 1
        begin = torch.rand((*shape[:-1], 1) if shape else (), generator=generator).double()
        share = (torch.arange(count, dtype=torch.float64) if shape else 0.0) + begin
        value = low + share / count * (high - low)
    else:
        value = torch.full(tuple(shape), 1.0 if kind == "ones" else 0.0, dtype=torch.float64)
    if spec.dtype in INTEGERS:
        return value.floor().clamp(int(low), int(high) - 1).to(torch.int64).to(dtype)
    return _inside(value.to(dtype), low, high)


def _uniform(
    shape: Sequence[int], low: float, high: float, dtype: torch.dtype, generator: torch.Generator
) -> torch.Tensor:
    share = torch.rand(shape, generator=generator).double()
    return _inside((share * high + (1 - share) * low).to(dtype), low, high)


def _inside(value: torch.Tensor, low: float, high: float) -> torch.Tensor:
    """Values of ``[low, high)`` as far as the dtype has them: rounding would reach the end of the range."""
    first, last = torch.tensor(low, dtype=value.dtype), torch.tensor(high, dtype=value.dtype)
    if first.item() < low:
        first = torch.nextafter(first, torch.full_like(first, math.inf))
    if last.item() >= high:
        last = torch.nextafter(last, torch.full_like(last, -math.inf))
    return value.clamp(first, last)


def _beside(spec: InputSpec, excluded: float) -> float | int:
    """An accepted value close to one that is excluded."""
    low, high = values_to_draw(spec) or VALUES[spec.dtype]
    if spec.dtype in INTEGERS:
        around = itertools.chain.from_iterable((int(excluded) + step, int(excluded) - step) for step in range(1, 1000))
        return next((value for value in around if low <= value < high and value not in spec.excludes), int(low))
    value = torch.tensor(excluded, dtype=getattr(torch, spec.dtype))
    towards = torch.full_like(value, math.inf if excluded < (low + high) / 2 else -math.inf)
    step = max(abs(excluded), 1.0) / 64  # not the next number: what divides by it would overflow
    value = value + (step if towards.item() > 0 else -step)
    while value.item() in spec.excludes:
        value = torch.nextafter(value, towards)
    return float(_inside(value, low, high).item())

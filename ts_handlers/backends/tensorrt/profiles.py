"""Optimization profiles: the ranges of sizes that a TensorRT plan is built for, and which profile serves a request.

TensorRT chooses kernels for each profile. The ranges are `Ranges` while a plan is built, and `Bounds` in its
description, for example ``{"batch": [1, 4, 16]}`` for smallest, optimal and largest size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch

from ts_handlers.backends.base import Target
from ts_handlers.errors import InputError
from ts_handlers.model.signature import Signature, Sizes
from ts_handlers.settings import Dimension
from ts_handlers.settings.sections import Range, TensorRTSettings

Ranges = dict[str, Range]
"""One profile by dimension name, while a plan is built."""
Bounds = dict[str, list[int]]
"""The same in a description: ``[min, opt, max]`` by dimension name."""

EXACT_PROFILES = 4
"""How many warm-up sizes get a profile of their own."""


def profile_ranges(target: Target) -> list[Ranges]:
    """The ranges of each optimization profile: those of the settings, or what warm-up and dimensions declare.

    In the latter case there is one profile for exactly each of the first warm-up sizes, whose kernels are faster than
    those for a range, and one for everything; see docs/decisions/0008-tensorrt-plans.md.
    """
    signature = target.require_signature()
    settings: TensorRTSettings = target.settings.tensorrt
    example = target.example_sizes
    declared = {n: Range(d.min, example[n], d.max) for n, d in signature.dimensions.items()}
    if settings.ranges:
        return [{**declared, **dict(ranges)} for ranges in settings.ranges]
    exact: list[Ranges] = []
    for sizes in target.settings.warmup_sizes[:EXACT_PROFILES]:
        ranges = {name: Range(size, size, size) for name, size in {**example, **sizes}.items()}
        if ranges not in exact and ranges != declared:
            exact.append(ranges)
    return [*exact, declared]


def enclosing_ranges(profiles: Sequence[Ranges]) -> Ranges:
    """The smallest ranges that hold those of every profile."""
    return {
        name: Range(min(p[name].min for p in profiles), profiles[0][name].opt, max(p[name].max for p in profiles))
        for name in profiles[0]
    }


def bounds_of(ranges: Ranges) -> Bounds:
    """A profile as a description and the key hold it, sorted by name."""
    return {name: [r.min, r.opt, r.max] for name, r in sorted(ranges.items())}


def sizes_at(ranges: Ranges, part: Literal["min", "opt", "max"]) -> Sizes:
    """The sizes at one point of a profile."""
    return {name: getattr(r, part) for name, r in ranges.items()}


def input_ranges(signature: Signature, ranges: Ranges, program: Any) -> list[Any]:
    """The program's inputs with their shapes at the ends and the middle of the ranges."""
    from ts_handlers.backends.tensorrt.inputs import InputRange

    def shape(spec: Any, part: str) -> tuple[int, ...]:
        return tuple(getattr(ranges[size], part) if isinstance(size, str) else size for size in spec.shape)

    return [
        InputRange(name, getattr(torch, spec.dtype), shape(spec, "min"), shape(spec, "opt"), shape(spec, "max"))
        for name, spec in zip(program.graph_signature.user_inputs, signature.inputs, strict=True)
    ]


def choose_profile(profiles: Sequence[Bounds], sizes: Sizes) -> int:
    """The profile that holds these sizes and is narrowest, or among equals closest to what it was optimised for.

    Raises
    ------
    InputError
        The plan was not built for these sizes.
    """

    def rank(index: int) -> tuple[int, int]:
        ranges = profiles[index]
        width = sum(high - low for low, _, high in ranges.values())
        return width, sum(abs(sizes[name] - opt) for name, (_, opt, _) in ranges.items())

    def holds(ranges: Bounds) -> bool:
        return all(low <= sizes[name] <= high for name, (low, _, high) in ranges.items())

    fitting = [index for index, ranges in enumerate(profiles) if holds(ranges)]
    if not fitting:
        known = "; ".join(show_bounds(ranges) for ranges in profiles)
        raise InputError(f"the TensorRT plan was not built for sizes {sizes}, only for {known}: extend tensorrt.ranges")
    return min(fitting, key=rank)


def show_bounds(ranges: Bounds) -> str:
    """A profile as text.

    Examples
    --------
    >>> show_bounds({"batch": [1, 4, 16]}), show_bounds({})
    ('batch=1..16', 'static')
    """
    return ",".join(f"{name}={low}..{high}" for name, (low, _, high) in sorted(ranges.items())) or "static"


def covered_signature(signature: Signature, profiles: Sequence[Bounds]) -> Signature:
    """The declared signature narrowed to the smallest box round all profiles."""
    dimensions = {}
    for name in signature.dimensions:
        lows, _, highs = zip(*(ranges[name] for ranges in profiles), strict=True)
        dimensions[name] = Dimension(min(lows), max(highs))
    return Signature(signature.inputs, dimensions)


def canary_sizes(profiles: Sequence[Bounds]) -> list[Sizes]:
    """What each profile was optimised for, then the smallest sizes of the first one."""
    sizes = [{name: opt for name, (_, opt, _) in ranges.items()} for ranges in profiles]
    smallest = {name: low for name, (low, _, _) in profiles[0].items()}
    return sizes if smallest in sizes else [*sizes, smallest]

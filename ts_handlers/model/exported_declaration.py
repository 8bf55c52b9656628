"""What the settings declare for an exported program, compared with what the program says of itself.

A program is what it is: its dtypes and ranges were settled when it was exported. What the settings say beside it is a
narrower range that holds for requests, the same again, or a mistake.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ts_handlers.errors import SettingsError
from ts_handlers.model.signature import Signature
from ts_handlers.settings import SECTION, Dimension, InputSpec

_AGAIN = "or export the program again"


def compare_dtype(program: Any, dtype: str | None) -> None:
    """Refuse a dtype other than that of the program's parameters, or of its inputs where it has none.

    Buffers and constants may be in another: position tables of models in half precision often are in float32.

    Raises
    ------
    SettingsError
        With the key, what the program has, and the remedy.
    """
    parameters = program.graph_signature.parameters
    found = _floating([program.state_dict[name] for name in parameters if name in program.state_dict]) or _floating(
        [node.meta.get("val") for node in program.graph.find_nodes(op="placeholder")]
    )
    if dtype is not None and found and found != {dtype}:
        raise SettingsError(
            f"{SECTION}.dtype: {dtype}, but the exported program is in {' and '.join(sorted(found))}, which cannot be "
            f"changed any more; remove it, or export the model in {dtype}"
        )


def _floating(values: Sequence[Any]) -> set[str]:
    tensors = [value for value in values if isinstance(value, torch.Tensor)]
    return {str(tensor.dtype)[6:] for tensor in tensors if tensor.is_floating_point()}


def compare_inputs(inputs: Sequence[InputSpec], dimensions: Mapping[str, Dimension], declared: Signature) -> None:
    """Refuse a declared signature unless the program takes everything that it admits.

    Parameters
    ----------
    inputs, dimensions:
        The program's own.

    Raises
    ------
    SettingsError
        With the key, what the program has, and the remedy.
    """
    names = [spec.name for spec in inputs]
    if list(declared.names) != names:
        raise SettingsError(
            f"{SECTION}.inputs: {', '.join(declared.names)}, but the exported program takes {', '.join(names)}; "
            f"declare these, in this order, {_AGAIN}"
        )
    first: dict[str, tuple[str, int | str]] = {}  # by the program's dimension: where it occurred, and what was declared
    for index, (own, spec) in enumerate(zip(inputs, declared.inputs, strict=True)):
        where = f"{SECTION}.inputs[{index}]"
        if spec.dtype != own.dtype:
            raise SettingsError(
                f"{where}.dtype: {spec.dtype}, but the exported program takes {own.name!r} in {own.dtype}; write "
                f"{own.dtype}, {_AGAIN}"
            )
        if len(spec.shape) != len(own.shape):
            raise SettingsError(
                f"{where}.shape: {len(spec.shape)} dimensions, but the exported program takes {own.name!r} with "
                f"{len(own.shape)}; declare these, {_AGAIN}"
            )
        for axis, (size, wanted) in enumerate(zip(own.shape, spec.shape, strict=True)):
            place = f"dimension {axis} of {own.name!r}"
            low, high = _range(size, dimensions)
            least, most = _range(wanted, declared.dimensions)
            if not low <= least <= most <= high:
                key = f"dimensions.{wanted}" if isinstance(wanted, str) else f"inputs[{index}].shape[{axis}]"
                remedy = f"write {low}" if low == high else "narrow it"
                if low == 2 and least < 2:  # what torch.export records for Dim.AUTO and Dim.DYNAMIC
                    remedy += ", export the program with torch.export.Dim(name, min=1) there if it takes size 1"
                raise SettingsError(
                    f"{SECTION}.{key}: {_shown(least, most)}, but the exported program takes {_shown(low, high)} as "
                    f"{place}; {remedy}, or export the program with another torch.export.Dim there"
                )
            if isinstance(size, str):
                elsewhere, before = first.setdefault(size, (place, wanted))
                fixed = least == most and _range(before, declared.dimensions) == (least, most)
                if before != wanted and not fixed:
                    raise SettingsError(
                        f"{where}.shape[{axis}]: {wanted}, but in the exported program {place} and {elsewhere} are one "
                        f"size, there declared as {before}; give both the same"
                    )


def _range(size: int | str, dimensions: Mapping[str, Dimension]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (dimensions[size].min, dimensions[size].max)


def _shown(low: int, high: int) -> str:
    return str(low) if low == high else f"{low}..{high}"

"""The model's input signature: what a request may look like.

An AOTInductor artifact does not check its inputs: called with another shape than it was built for it answers with
wrong numbers, and where an index is out of range it ends the process. So every call is checked here against the
declared names, dtypes, shapes, ranges and limits, and what does not fit is refused before it reaches an artifact.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import msgspec
import torch

from ts_handlers.errors import InputError, LoadError, shown
from ts_handlers.model.limits import check_values
from ts_handlers.model.sampling import RANDOM, draw
from ts_handlers.settings import Dimension, InputSpec
from ts_handlers.settings.values import column_limits, values_to_draw

Sizes = dict[str, int]
_REMEMBERED = 1000
"""Combinations of dtypes and shapes that `Signature.check` has accepted and need not look at again."""
_SHOWN = 16
"""Dimensions of a shape that a message shows."""


class Signature:
    """Declared inputs and the ranges of their dynamic dimensions.

    Parameters
    ----------
    inputs:
        The inputs in the order in which positional arguments are taken.
    dimensions:
        Inclusive ranges, by the names that the shapes use.
    kind:
        Which inputs `generate` draws, one of `ts_handlers.model.sampling.KINDS`; None, which draws random ones, until
        the model was seen to accept a kind.
    found:
        The inputs whose limits a build has found, and nobody declared.
    """

    def __init__(
        self,
        inputs: Sequence[InputSpec],
        dimensions: Mapping[str, Dimension],
        kind: str | None = None,
        found: Collection[str] = (),
    ) -> None:
        self.kind = kind
        self._found = found
        self.inputs = tuple(_with_values(spec) for spec in inputs)
        self.dimensions = dict(dimensions)
        self.names = tuple(spec.name for spec in self.inputs)
        self._has_limits = tuple(spec.limits is not None or bool(spec.excludes) for spec in self.inputs)
        self._dtypes = tuple(getattr(torch, spec.dtype) for spec in self.inputs)
        self._ranges = {name: (d.min, d.max) for name, d in self.dimensions.items()}
        self._accepted: dict[tuple[tuple[torch.dtype, torch.Size], ...], Sizes] = {}
        self._axes = {
            size: (index, axis)
            for index, spec in enumerate(self.inputs)
            for axis, size in enumerate(spec.shape)
            if isinstance(size, str)
        }

    def bind(self, args: Sequence[Any], kwargs: Mapping[str, Any], device: torch.device) -> list[torch.Tensor]:
        """Put a call's arguments in declared order, contiguous and on `device`.

        Returns
        -------
        One tensor for each declared input, with the shape and dtype of the argument; `check` looks at these.

        Raises
        ------
        InputError
            An argument is missing, unknown, given twice or not a tensor, or it holds a value outside its limits.
        """
        if len(args) > len(self.names):
            raise InputError(
                f"expected at most {len(self.names)} inputs ({', '.join(self.names)}), found {len(args)} by position"
            )
        values: list[torch.Tensor] = []
        for index, name in enumerate(self.names):
            if index < len(args):
                if name in kwargs:
                    raise InputError(f"input {name!r} was given twice, by position and by name")
                value = args[index]
            elif name in kwargs:
                value = kwargs[name]
            else:
                raise InputError(f"input {name!r} is missing; expected {', '.join(self.names)}")
            if not isinstance(value, torch.Tensor):
                raise InputError(f"input {name!r}: expected a tensor, found {type(value).__name__}")
            if value.layout != torch.strided:
                raise InputError(f"input {name!r}: expected a dense tensor, found layout {str(value.layout)[6:]}")
            if self._has_limits[index]:  # looked at where the tensor lies: on a GPU it would take a synchronisation
                check_values(self.inputs[index], value)
            if value.device != device:
                value = value.to(device, non_blocking=True)
            # An artifact reads the memory as it lies, so pending negations (imag of a conjugate) are carried out here.
            if value.is_neg() or not value.is_contiguous():
                value = value.resolve_neg().contiguous()
            values.append(value)
        if len(args) + len(kwargs) > len(self.names):
            unknown = set(kwargs) - set(self.names)
            raise InputError(
                f"unknown input {shown(min(unknown))}{_and_more(len(unknown) - 1)}; declared are "
                f"{', '.join(self.names)} (handler.ts_handlers.inputs in model-config.yaml)"
            )
        return values

    def check(self, tensors: Sequence[torch.Tensor]) -> Sizes:
        """Check tensors in declared order.

        Returns
        -------
        The sizes of the dynamic dimensions, by name. It is kept for later calls: do not change it.

        Raises
        ------
        InputError
            A dtype, rank, static size or range does not fit, or two inputs disagree on a dimension.
        """
        kinds = tuple([(tensor.dtype, tensor.shape) for tensor in tensors])
        accepted = self._accepted.get(kinds)
        if accepted is None:
            accepted = self._check(tensors)
            if len(self._accepted) < _REMEMBERED:
                self._accepted[kinds] = accepted
        return accepted

    def _check(self, tensors: Sequence[torch.Tensor]) -> Sizes:
        sizes: Sizes = {}
        for spec, dtype, tensor in zip(self.inputs, self._dtypes, tensors, strict=True):
            if tensor.dtype != dtype:
                raise InputError(
                    f"input {spec.name!r}: expected dtype {spec.dtype}, found {str(tensor.dtype)[6:]}; "
                    "convert it in preprocess"
                )
            shape = tensor.shape
            if len(shape) != len(spec.shape):
                raise InputError(
                    f"input {spec.name!r}: expected {len(spec.shape)} dimensions {_show(spec.shape)}, "
                    f"found {len(shape)}: {_show(shape)}"
                )
            for axis, expected in enumerate(spec.shape):
                found = shape[axis]
                if isinstance(expected, int):
                    if found != expected:
                        raise InputError(
                            f"input {spec.name!r}: expected size {expected} in dimension {axis} of "
                            f"{_show(spec.shape)}, found {found}: {_show(shape)}"
                        )
                elif sizes.setdefault(expected, found) != found:
                    raise InputError(
                        f"input {spec.name!r}: dimension {expected!r} is {found}, in another input {sizes[expected]}"
                    )
        for name, size in sizes.items():
            low, high = self._ranges[name]
            if not low <= size <= high:
                raise InputError(
                    f"dimension {name!r}: size {size} is outside the declared range {low}..{high}; send a smaller or "
                    f"larger input, or widen handler.ts_handlers.dimensions.{name}"
                )
        return sizes

    def check_limits(self, values: Mapping[str, Any]) -> None:
        """Raise `InputError` where a tensor, given by its input's name, holds a value outside its limits."""
        for spec, has_limits in zip(self.inputs, self._has_limits, strict=True):
            value = values.get(spec.name)
            if has_limits and isinstance(value, torch.Tensor) and value.layout == torch.strided:
                check_values(spec, value)

    def sizes(self, tensors: Sequence[torch.Tensor]) -> Sizes:
        """The sizes of the dynamic dimensions of tensors that `check` has accepted."""
        return {name: tensors[index].shape[axis] for name, (index, axis) in self._axes.items()}

    def generate(self, sizes: Mapping[str, int], seed: int = 0) -> list[torch.Tensor]:
        """Draw inputs of the given sizes on the CPU, the same for the same seed.

        Returns
        -------
        One tensor for each declared input, in order, with its declared dtype, and its declared shape with the sizes in
        the place of the names.

        Examples
        --------
        >>> signature = Signature([InputSpec("x", "float32", ("batch", 3))], {"batch": Dimension(1, 8)})
        >>> [tuple(tensor.shape) for tensor in signature.generate({"batch": 2})]
        [(2, 3)]
        """
        generator = torch.Generator().manual_seed(seed)
        tensors = []
        for spec in self.inputs:
            shape = [size if isinstance(size, int) else sizes[size] for size in spec.shape]
            tensors.append(draw(spec, shape, generator, self.kind or RANDOM))
        return tensors

    def example_sizes(self, wanted: Mapping[str, int] | None = None) -> Sizes:
        """Sizes to compile for: at least 2 where the range allows it, and different from each other.

        Equal sizes and sizes 0 and 1 invite the exporter to specialise (torch.export's 0/1 specialisation).
        `wanted` (the first warm-up entry) is taken where it does not.
        """
        sizes: Sizes = {}
        for position, (name, dimension) in enumerate(self.dimensions.items()):
            default = 4 if position == 0 else 17 + 2 * position
            size = (wanted or {}).get(name, default)
            size = min(max(size, dimension.min, 2), dimension.max)
            upwards, downwards = range(size + 1, dimension.max + 1), range(size - 1, dimension.min - 1, -1)
            for candidate in itertools.chain([size], upwards, downwards):
                if candidate not in sizes.values() and (candidate >= 2 or dimension.max == 1):
                    size = candidate
                    break
            sizes[name] = size
        return sizes

    def corner_sizes(self) -> list[Sizes]:
        """Sizes at the ends of the ranges: every combination of smallest and example, and one maximum at a time."""
        example = self.example_sizes()
        choices = [sorted({d.min, example[name]}) for name, d in self.dimensions.items()]
        corners = [dict(zip(self.dimensions, sizes, strict=True)) for sizes in itertools.product(*choices)]
        smallest = {name: d.min for name, d in self.dimensions.items()}
        for name, dimension in self.dimensions.items():
            corners.append({**smallest, name: dimension.max})
        unique: list[Sizes] = []
        for corner in corners:
            if corner not in unique:
                unique.append(corner)
        return unique

    def narrowed(self, ranges: Mapping[str, tuple[int, int]]) -> Signature:
        """The same inputs with other ranges for some dimensions."""
        dimensions = {
            name: Dimension(*ranges[name]) if name in ranges else dimension
            for name, dimension in self.dimensions.items()
        }
        return Signature(self.inputs, dimensions, self.kind)

    def with_values_of(self, declared: Signature) -> Signature:
        """The same signature with the values and limits that `declared` has for its inputs.

        No artifact depends on them, so an entry may have been built with other ones than are declared now. Limits that
        the build has found hold where none are declared.

        Raises
        ------
        LoadError
            Limits are declared for an input that this signature does not have.
        """
        specs = {spec.name: spec for spec in declared.inputs}
        limited = [name for name, spec in specs.items() if spec.limits is not None or spec.excludes]
        unknown = [name for name in limited if name not in self.names]
        if unknown:
            raise LoadError(f"the artifact has no input {unknown[0]!r}, for which limits are declared")
        inputs = [_declared_for(spec, specs.get(spec.name), spec.name in self._found) for spec in self.inputs]
        return Signature(inputs, self.dimensions, declared.kind)

    def canonical(self) -> str:
        """One line that is equal for signatures of equal names, dtypes, shapes and ranges; a part of the cache key."""
        inputs = ";".join(f"{s.name}:{s.dtype}[{','.join(map(str, s.shape))}]" for s in self.inputs)
        ranges = ",".join(f"{name}={d.min}..{d.max}" for name, d in sorted(self.dimensions.items()))
        return f"{inputs}|{ranges}"


def row_dimension(inputs: Sequence[InputSpec]) -> str | None:
    """The dynamic dimension that counts rows: dimension 0 of every input, and no other one; None without one.

    Examples
    --------
    >>> row_dimension([InputSpec("ids", "int64", ("batch", "sequence")), InputSpec("age", "float32", ("batch",))])
    'batch'
    """
    leading = {spec.shape[0] if spec.shape else None for spec in inputs}
    name = leading.pop() if len(leading) == 1 else None
    if not isinstance(name, str) or any(name in spec.shape[1:] for spec in inputs):
        return None
    return name


def _with_values(spec: InputSpec) -> InputSpec:
    """An input that has limits with the range in them from which it is drawn; an artifact's manifest keeps that one."""
    if spec.limits is None or spec.values is not None or column_limits(spec) is not None:
        return spec
    return msgspec.structs.replace(spec, values=values_to_draw(spec))


def _declared_for(spec: InputSpec, declared: InputSpec | None, found: bool) -> InputSpec:
    """An artifact's input with the values and limits that are declared for it."""
    if declared is None:
        return spec
    values, limits = declared.values, declared.limits
    if limits is None and found:
        limits, values = spec.limits, spec.values if values is None else values
    return msgspec.structs.replace(spec, values=values, limits=limits, excludes=declared.excludes)


def _show(shape: Sequence[int | str]) -> str:
    return "[" + ", ".join([*map(str, shape[:_SHOWN]), *(["..."] if len(shape) > _SHOWN else [])]) + "]"


def _and_more(count: int) -> str:
    return f" and {count} more" if count else ""

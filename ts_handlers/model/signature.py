"""The model's input signature: what a request may look like.

An AOTInductor artifact does not check its inputs: called with another shape than it was built for it answers with
wrong numbers, and where an index is out of range it ends the process. So every call is checked here against the
declared names, dtypes, shapes, ranges and limits, and what does not fit is refused before it reaches an artifact.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import msgspec
import torch

from ts_handlers.errors import InputError, LoadError
from ts_handlers.settings import DTYPES, Dimension, InputSpec
from ts_handlers.settings.values import values_to_draw

Sizes = dict[str, int]
_REMEMBERED = 1000
"""Combinations of dtypes and shapes that `Signature.check` has accepted and need not look at again."""
_ORDERED = {getattr(torch, name) for name in DTYPES}


class Signature:
    """Declared inputs and the ranges of their dynamic dimensions.

    Parameters
    ----------
    inputs:
        The inputs in the order in which positional arguments are taken.
    dimensions:
        Inclusive ranges, by the names that the shapes use.
    found:
        The inputs whose limits a build has found, and nobody declared.
    """

    def __init__(
        self, inputs: Sequence[InputSpec], dimensions: Mapping[str, Dimension], found: Collection[str] = ()
    ) -> None:
        self._found = found
        self.inputs = tuple(_with_values(spec) for spec in inputs)
        self.dimensions = dict(dimensions)
        self.names = tuple(spec.name for spec in self.inputs)
        self._limits = tuple(spec.limits for spec in self.inputs)
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
            limits = self._limits[index]
            if limits is not None:  # looked at where the tensor lies: on a GPU it would take a synchronisation
                _check_limits(name, value, *limits)
            if value.device != device:
                value = value.to(device, non_blocking=True)
            # An artifact reads the memory as it lies, so pending negations (imag of a conjugate) are carried out here.
            if value.is_neg() or not value.is_contiguous():
                value = value.resolve_neg().contiguous()
            values.append(value)
        if len(args) + len(kwargs) > len(self.names):
            unknown = sorted(set(kwargs) - set(self.names))
            raise InputError(
                f"unknown input {', '.join(map(repr, unknown))}; declared are {', '.join(self.names)} "
                "(handler.ts_handlers.inputs in model-config.yaml)"
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
                    f"found {len(shape)}: {list(shape)}"
                )
            for axis, expected in enumerate(spec.shape):
                found = shape[axis]
                if isinstance(expected, int):
                    if found != expected:
                        raise InputError(
                            f"input {spec.name!r}: expected size {expected} in dimension {axis} of "
                            f"{_show(spec.shape)}, found {found}: {list(shape)}"
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
        for spec, dtype in zip(self.inputs, self._dtypes, strict=True):
            shape = [size if isinstance(size, int) else sizes[size] for size in spec.shape]
            drawn_from = values_to_draw(spec)
            if drawn_from is None:
                tensors.append(torch.randn(shape, generator=generator).to(dtype))
            elif dtype.is_floating_point:
                tensors.append(_draw(shape, *drawn_from, dtype, generator))
            else:
                low, high = map(int, drawn_from)
                tensors.append(torch.randint(low, high, shape, generator=generator).to(dtype))
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
        return Signature(self.inputs, dimensions)

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
        unknown = [name for name, spec in specs.items() if spec.limits is not None and name not in self.names]
        if unknown:
            raise LoadError(f"the artifact has no input {unknown[0]!r}, for which limits are declared")
        inputs = [_declared_for(spec, specs.get(spec.name), spec.name in self._found) for spec in self.inputs]
        return Signature(inputs, self.dimensions)

    def canonical(self) -> str:
        """One line that is equal for signatures of equal names, dtypes, shapes and ranges; a part of the cache key."""
        inputs = ";".join(f"{s.name}:{s.dtype}[{','.join(map(str, s.shape))}]" for s in self.inputs)
        ranges = ",".join(f"{name}={d.min}..{d.max}" for name, d in sorted(self.dimensions.items()))
        return f"{inputs}|{ranges}"


def _with_values(spec: InputSpec) -> InputSpec:
    """An input that has limits with the range in them from which it is drawn; an artifact's manifest keeps that one."""
    if spec.limits is None or spec.values is not None:
        return spec
    return msgspec.structs.replace(spec, values=values_to_draw(spec))


def _declared_for(spec: InputSpec, declared: InputSpec | None, found: bool) -> InputSpec:
    """An artifact's input with the values and limits that are declared for it."""
    if declared is None:
        return spec
    if declared.limits is None and found:
        values = spec.values if declared.values is None else declared.values
        return msgspec.structs.replace(spec, values=values)
    return msgspec.structs.replace(spec, values=declared.values, limits=declared.limits)


def _check_limits(name: str, tensor: torch.Tensor, low: float | None, high: float | None) -> None:
    """Refuse values below `low` or from `high` on, and those that are not a number."""
    if tensor.dtype not in _ORDERED:
        raise InputError(f"input {name!r}: expected real numbers, found {str(tensor.dtype)[6:]}")
    if not tensor.numel():
        return
    ends = tensor.aminmax()
    least, most = torch.stack(ends).tolist() if tensor.is_cuda else (ends[0].item(), ends[1].item())
    # NaN, which `aminmax` hands on, fails every comparison.
    if (low is None or low <= least) and (high is None or most < high):
        return
    found = most if low is None or low <= least else least
    shown = ", ".join("null" if bound is None else f"{bound}" for bound in (low, high))
    raise InputError(
        f"input {name!r}: expected values inside its limits [{shown}), found {found}; the limits are declared in "
        f"handler.ts_handlers.inputs of model-config.yaml, or are the size of the table that the model looks up"
    )


def _draw(
    shape: Sequence[int], low: float, high: float, dtype: torch.dtype, generator: torch.Generator
) -> torch.Tensor:
    """Uniform values of ``[low, high)`` as far as the dtype has them: rounding would reach the end of the range."""
    share = torch.rand(shape, generator=generator).double()
    value = (share * high + (1 - share) * low).to(dtype)
    first, last = torch.tensor(low, dtype=dtype), torch.tensor(high, dtype=dtype)
    if first.item() < low:
        first = torch.nextafter(first, torch.full_like(first, math.inf))
    if last.item() >= high:
        last = torch.nextafter(last, torch.full_like(last, -math.inf))
    return value.clamp(first, last)


def _show(shape: Sequence[int | str]) -> str:
    return "[" + ", ".join(map(str, shape)) + "]"

"""What a model takes, found from calls of it that were seen, as the settings would declare it.

A dimension that differs between two calls becomes a range, dimensions that always had the same sizes become one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import msgspec

from ts_handlers.errors import BuildError
from ts_handlers.model.observed_calls import ObservedCalls, SeenKind, Shapes
from ts_handlers.settings import Dimension, InputSpec, Settings

WARMUPS = 3
"""Sizes that are warmed up, the most frequent ones."""
ROWS = 16
"""Rows up to which dimension 0 goes at least, once it was seen to vary."""
WITHOUT_LIMITS = ("inductor", "torch_tensorrt")
"""Backends that have no whole graph, in which the tables that an index looks up could be found."""
_INDICES = ("int64", "int32")
_Axis = tuple[int, int]


class Declaration(msgspec.Struct, frozen=True):
    """Inputs, dimensions and warm-up sizes, as in `ts_handlers.settings.Settings`."""

    inputs: tuple[InputSpec, ...]
    dimensions: dict[str, Dimension] = {}
    warmup: tuple[dict[str, int], ...] = ()

    def is_same_as(self, other: Declaration) -> bool:
        """Whether it stands for the same artifact: the same inputs and ranges."""
        return (self.inputs, self.dimensions) == (other.inputs, other.dimensions)

    def applied_to(self, settings: Settings) -> Settings:
        """The settings with this declaration in the place of theirs; calls outside it are answered eagerly.

        Where an input may be an index, the backends are left out that cannot tell its limits: nobody has declared any,
        and in their artifacts an index that is out of range may end the process, which it does not in eager code.
        """
        warmup = settings.warmup if settings.warmup_sizes else self.warmup
        backends = settings.backends
        if any(spec.dtype in _INDICES for spec in self.inputs):
            backends = tuple(name for name in backends if name not in WITHOUT_LIMITS) or ("eager",)
        return msgspec.structs.replace(
            settings,
            inputs=self.inputs,
            dimensions=self.dimensions,
            warmup=warmup,
            outside="eager",
            backends=backends,
        )


def declare(
    calls: ObservedCalls,
    rows: int = 1,
    values: Mapping[str, tuple[float, float]] | None = None,
    before: Declaration | None = None,
) -> Declaration:
    """The declaration that fits the most frequent kind of calls.

    Parameters
    ----------
    calls:
        What was seen.
    rows:
        The largest batch that the server forms.
    values:
        The range from which an input is drawn for checks and warm-up, by name.
    before:
        The declaration that held until now, whose ranges are kept.

    Raises
    ------
    BuildError
        No call could be compiled.

    Examples
    --------
    >>> import torch
    >>> from ts_handlers.model.observed_calls import call_kind
    >>> calls = ObservedCalls()
    >>> for shape in ((1, 5), (2, 9)):
    ...     _ = calls.add(*call_kind(torch.nn.Embedding(9, 2), [torch.zeros(shape, dtype=torch.int64)], {}))
    >>> print(as_line(declare(calls)))
    inputs: [{name: input, dtype: int64, shape: [batch, length]}], \
dimensions: {batch: {min: 1, max: 16}, length: {min: 5, max: 9}}
    """
    seen = _widened(_most_frequent(calls), before)
    groups = _groups(seen)
    names: dict[_Axis, str] = {}
    dimensions: dict[str, Dimension] = {}
    for axes in groups:
        name = _name(axes, seen, dimensions)
        names.update(dict.fromkeys(axes, name))
        low = min(seen.low[index][axis] for index, axis in axes)
        high = max(seen.high[index][axis] for index, axis in axes)
        if all(axis == 0 for _, axis in axes):
            low, high = 1, 1 << (max(high, rows, ROWS) - 1).bit_length()
        dimensions[name] = Dimension(low, high)
    drawn = {} if before is None else {spec.name: spec.values for spec in before.inputs if spec.values is not None}
    drawn.update(values or {})
    inputs = []
    for index, (name, dtype, rank) in enumerate(seen.kind.inputs):
        shape = tuple(names.get((index, axis), seen.low[index][axis]) for axis in range(rank))
        inputs.append(InputSpec(name, dtype, shape, drawn.get(name)))  # type: ignore[arg-type]
    return Declaration(tuple(inputs), dimensions, frequent_sizes(seen, names))


def why_none(calls: ObservedCalls) -> str:
    """Why `declare` finds nothing in the calls that were seen."""
    kinds = calls.kinds()
    if not kinds:
        return "no call of the model was seen"
    other = kinds[0].kind.other
    what = ", ".join(other[:5])[:300] if other else "no tensors"
    return f"the calls that were seen hold what an artifact does not take: {what}"


def _most_frequent(calls: ObservedCalls) -> SeenKind:
    for seen in calls.kinds():
        if seen.kind.inputs and not seen.kind.other:
            return seen
    raise BuildError(why_none(calls))


def _widened(seen: SeenKind, before: Declaration | None) -> SeenKind:
    """The same calls with the ranges of a declaration of the same inputs."""
    if before is None or seen.kind.inputs != tuple((s.name, s.dtype, len(s.shape)) for s in before.inputs):
        return seen
    low, high = (_ends(before, which) for which in ("min", "max"))
    return msgspec.structs.replace(
        seen,
        low=tuple(tuple(map(min, a, b)) for a, b in zip(seen.low, low, strict=True)),
        high=tuple(tuple(map(max, a, b)) for a, b in zip(seen.high, high, strict=True)),
    )


def _ends(declaration: Declaration, which: str) -> Shapes:
    return tuple(
        tuple(size if isinstance(size, int) else getattr(declaration.dimensions[size], which) for size in spec.shape)
        for spec in declaration.inputs
    )


def _groups(seen: SeenKind) -> list[list[_Axis]]:
    """The axes that vary, those together that had the same sizes in every call that is kept."""
    groups: dict[tuple[int, ...], list[_Axis]] = {}
    for index, axis in _axes(seen):
        low, high = seen.low[index][axis], seen.high[index][axis]
        if low != high:
            sizes = tuple(shapes[index][axis] for shapes, _ in seen.shapes)
            groups.setdefault((low, high, *sizes), []).append((index, axis))
    return list(groups.values())


def _axes(seen: SeenKind) -> Iterator[_Axis]:
    for index, shape in enumerate(seen.low):
        yield from ((index, axis) for axis in range(len(shape)))


def _name(axes: list[_Axis], seen: SeenKind, taken: Mapping[str, Dimension]) -> str:
    index, axis = axes[0]
    rank = seen.kind.inputs[index][2]
    if any(each == 0 for _, each in axes):
        name = "batch"
    elif rank <= 3:
        name = "length" if axis == 1 else f"size_{axis}"
    else:
        name = {rank - 2: "height", rank - 1: "width"}.get(axis, f"size_{axis}")
    return next(each for each in (name, *(f"{name}_{count}" for count in range(2, 1000))) if each not in taken)


def frequent_sizes(seen: SeenKind, names: Mapping[_Axis, str]) -> tuple[dict[str, int], ...]:
    """The most frequent sizes of the dimensions, at most `WARMUPS`."""
    found: list[dict[str, int]] = []
    for shapes, _ in sorted(seen.shapes, key=lambda item: -item[1]):
        sizes = {name: shapes[index][axis] for (index, axis), name in names.items()}
        if sizes and sizes not in found:
            found.append(sizes)
    return tuple(found[:WARMUPS])


def as_line(declaration: Declaration) -> str:
    """A declaration as one line of YAML, for messages."""
    inputs = ", ".join(_flow(spec) for spec in declaration.inputs)
    text = f"inputs: [{inputs}]"
    if declaration.dimensions:
        text += f", dimensions: {{{', '.join(_dimension(*item) for item in declaration.dimensions.items())}}}"
    return text


def as_yaml(declaration: Declaration, indent: str = "    ") -> str:
    """A declaration as the lines below ``handler: ts_handlers:`` in model-config.yaml."""
    lines = ["inputs:", *(f"  - {_flow(spec)}" for spec in declaration.inputs)]
    if declaration.dimensions:
        lines += ["dimensions:", *(f"  {_dimension(*item)}" for item in declaration.dimensions.items())]
    if declaration.warmup:
        sizes = (", ".join(f"{name}: {size}" for name, size in each.items()) for each in declaration.warmup)
        lines.append(f"warmup: [{', '.join(f'{{{each}}}' for each in sizes)}]")
    return "".join(f"{indent}{line}\n" for line in lines)


def _flow(spec: InputSpec) -> str:
    values = "" if spec.values is None else f", values: [{spec.values[0]:g}, {spec.values[1]:g}]"
    return f"{{name: {spec.name}, dtype: {spec.dtype}, shape: [{', '.join(map(str, spec.shape))}]{values}}}"


def _dimension(name: str, dimension: Dimension) -> str:
    return f"{name}: {{min: {dimension.min}, max: {dimension.max}}}"

"""Calls of a model by names, dtypes and shapes: what is known of them where nobody has declared its inputs.

Contents are not looked at. How much is kept is bounded, whatever calls come.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import msgspec
import torch

from ts_handlers.settings import DTYPES, InputSpec

Shapes = tuple[tuple[int, ...], ...]
"""The shape of each input of a call."""
KINDS = 8
"""Kinds of calls that are kept."""
SHAPES = 64
"""Different shapes that are kept of one kind; ranges are kept of all."""
_ARGUMENTS = 64
"""Arguments of one call that are kept."""
_NAME = 64


class Observer(Protocol):
    """What notes the calls that the eager module answers; see `ts_handlers.startup.observation`.

    `refuses_changes` tells whether a change of the eager module would be lost, so that it must be refused.
    """

    refuses_changes: bool

    def note(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Note a call that was answered; never raises."""

    def give_way(self) -> torch.nn.Module | None:
        """Before a change of the module: have it serve again and return it; None where the change must be refused."""

    def describe(self) -> dict[str, Any]:
        """What is known, JSON-compatible."""


class CallKind(msgspec.Struct, frozen=True):
    """What calls of one kind have in common.

    Attributes
    ----------
    inputs:
        Name, dtype and rank of each tensor, in the order of the parameters of `forward`.
    other:
        Arguments that are no dense tensors of a known dtype, each as ``name: type``; such a call cannot be compiled.
    """

    inputs: tuple[tuple[str, str, int], ...]
    other: tuple[str, ...] = ()


class SeenKind(msgspec.Struct):
    """Calls of one kind: how many, the smallest and the largest sizes, and how often each shape came."""

    kind: CallKind
    count: int
    low: Shapes
    high: Shapes
    shapes: list[tuple[Shapes, int]] = []


class ObservedCalls:
    """Calls that were seen, by kind.

    Examples
    --------
    >>> calls = ObservedCalls()
    >>> linear = torch.nn.Linear(4, 3)
    >>> calls.add(*call_kind(linear, [torch.zeros(2, 4)], {})), calls.add(*call_kind(linear, [torch.ones(2, 4)], {}))
    (True, False)
    >>> [(seen.kind.inputs, seen.count, seen.shapes) for seen in calls.kinds()]
    [((('input', 'float32', 2),), 2, [(((2, 4),), 2)])]
    """

    def __init__(self, seen: Iterable[SeenKind] = ()) -> None:
        self._seen: dict[CallKind, SeenKind] = {}
        for each in seen:
            self._merge(each)

    def kinds(self) -> list[SeenKind]:
        """Copies of what was seen, the most frequent kind first."""
        copies = [msgspec.structs.replace(each, shapes=list(each.shapes)) for each in self._seen.values()]
        return sorted(copies, key=lambda each: -each.count)

    @property
    def count(self) -> int:
        """How many calls were seen."""
        return sum(each.count for each in self._seen.values())

    def add(self, kind: CallKind, shapes: Shapes) -> bool:
        """Add one call; whether its kind or its shapes are new, and kept."""
        seen = self._seen.get(kind)
        if seen is not None:
            for index, (known, count) in enumerate(seen.shapes):
                if known == shapes:
                    seen.shapes[index] = (known, count + 1)
                    seen.count += 1
                    return False
        self._merge(SeenKind(kind, 1, shapes, shapes, [(shapes, 1)]))
        return kind in self._seen

    def merge(self, other: ObservedCalls) -> None:
        """Add the calls that another object has seen."""
        for each in other.kinds():
            self._merge(each)

    def like(self, inputs: Sequence[InputSpec]) -> ObservedCalls:
        """The calls that have these inputs, in names, dtypes and ranks."""
        wanted = tuple((spec.name, spec.dtype, len(spec.shape)) for spec in inputs)
        return ObservedCalls(each for each in self.kinds() if each.kind == CallKind(wanted))

    def _merge(self, new: SeenKind) -> None:
        seen = self._seen.get(new.kind)
        if seen is None:
            if len(self._seen) < KINDS:
                shapes = sorted(new.shapes, key=lambda item: -item[1])[:SHAPES]
                self._seen[new.kind] = msgspec.structs.replace(new, shapes=shapes)
            return
        seen.count += new.count
        seen.low, seen.high = _each(min, seen.low, new.low), _each(max, seen.high, new.high)
        counts = dict(seen.shapes)
        for came, count in new.shapes:
            counts[came] = counts.get(came, 0) + count
        if len(counts) > SHAPES:  # one that came once goes for a new one
            counts = dict(sorted(counts.items(), key=lambda item: -item[1])[: SHAPES - 1])
            counts.update(dict(new.shapes[:1]))
        seen.shapes = list(counts.items())


def _each(function: Any, left: Shapes, right: Shapes) -> Shapes:
    return tuple(tuple(map(function, a, b)) for a, b in zip(left, right, strict=True))


def call_kind(module: torch.nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[CallKind, Shapes]:
    """The kind of a call of `module.forward`, and the shapes of its tensors.

    Examples
    --------
    >>> call_kind(torch.nn.Embedding(5, 2), [], {"input": torch.tensor([[1, 2]])})
    (CallKind(inputs=(('input', 'int64', 2),), other=()), ((1, 2),))
    >>> call_kind(torch.nn.Linear(4, 3), [[1.0]], {})[0].other
    ('input: list',)
    """
    inputs: list[tuple[str, str, int]] = []
    other: list[str] = []
    shapes: list[tuple[int, ...]] = []
    for count, (name, value) in enumerate(named_arguments(module, args, kwargs)):
        name = name[:_NAME]
        if count == _ARGUMENTS:
            other.append("more arguments")
            break
        what = _not_an_input(name, value)
        if what is None:
            inputs.append((name, str(value.dtype)[6:], value.dim()))
            shapes.append(tuple(value.shape))
        else:
            other.append(f"{name}: {what}")
    return CallKind(tuple(inputs), tuple(other)), tuple(shapes)


def _not_an_input(name: str, value: Any) -> str | None:
    """What an argument is that cannot be declared as an input; None when it can."""
    if not isinstance(value, torch.Tensor):
        return type(value).__name__[:_NAME]
    if value.layout != torch.strided:
        return f"{str(value.layout)[6:]} tensor"
    if str(value.dtype)[6:] not in DTYPES:
        return f"{str(value.dtype)[6:]} tensor"
    if 0 in value.shape:
        return "empty tensor"
    return None if name.isidentifier() else "tensor without a name"


def named_arguments(
    module: torch.nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Iterator[tuple[str, Any]]:
    """The arguments of a call under the names that `forward` gives them, in its order."""
    signature = _signature(module)
    if signature is None:
        yield from ((f"input_{index}", value) for index, value in enumerate(args))
        yield from kwargs.items()
        return
    bound = signature.bind(*args, **kwargs).arguments
    for name, value in bound.items():
        kind = signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_POSITIONAL:
            yield from ((f"{name}_{index}", item) for index, item in enumerate(value))
        elif kind is inspect.Parameter.VAR_KEYWORD:
            yield from value.items()
        else:
            yield name, value


def _signature(module: torch.nn.Module) -> inspect.Signature | None:
    try:
        return inspect.signature(module.forward)
    except (TypeError, ValueError):
        return None

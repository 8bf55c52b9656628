"""Nested outputs of a model as a flat list of tensors and a structure that JSON can hold.

A compiled artifact takes and gives flat lists of tensors. `flatten` takes the eager model's output apart and
`unflatten` puts an artifact's output together in the same shape, in the eager model's own classes where the process has
imported them. It imports none: without transformers a Hugging Face ``ModelOutput`` comes back as an `OutputMapping`.

An `OutputStructure` is one of::

    {"kind": "tensor"}
    {"kind": "constant", "value": None | bool | int | float | str}
    {"kind": "tuple" | "list", "items": [structure, ...]}
    {"kind": "dict" | "mapping" | "namedtuple", "keys": [str, ...], "items": [structure, ...]}
    {"kind": "cache", "class": "module:qualified name", "items": [structure, ...]}

``mapping`` stands for an output class with attributes (a dataclass or a ``ModelOutput``). ``mapping`` and
``namedtuple`` may have ``"class": "module:qualified name"`` and ``"absent": [str, ...]``, fields that are None and no
keys. ``cache`` is a ``DynamicCache`` of transformers: keys and values of each layer in turn.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import json
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from ts_handlers.errors import BuildError

OutputStructure = dict[str, Any]
"""How an output is nested, in one of the forms above."""


class OutputMapping(Mapping[str, Any]):
    """A model's output with named fields: ``out.logits``, ``out["logits"]`` and ``out[0]`` are the same tensor.

    Replaces the model-output class of the eager model (for example ``transformers.utils.ModelOutput``), whose
    module is not imported on a warm start.

    Examples
    --------
    >>> out = OutputMapping({"logits": 1, "hidden": 2})
    >>> out.logits, out["hidden"], out[1], out[:2], list(out)
    (1, 2, 2, (1, 2), ['logits', 'hidden'])
    """

    __slots__ = ("_absent", "_fields")

    def __init__(self, fields: dict[str, Any], absent: tuple[str, ...] = ()) -> None:
        self._fields = fields
        self._absent = absent

    def __getitem__(self, key: Any) -> Any:
        return self._fields[key] if isinstance(key, str) else self.to_tuple()[key]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        try:
            return self._fields[name]
        except KeyError:
            if name in self._absent:
                return None
            raise AttributeError(f"the model's output has no field {name!r}; it has {list(self._fields)}") from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._fields)

    def __len__(self) -> int:
        return len(self._fields)

    def __repr__(self) -> str:
        return f"OutputMapping({self._fields!r})"

    def to_tuple(self) -> tuple[Any, ...]:
        """The fields' values in order, as ``ModelOutput.to_tuple`` gives them."""
        return tuple(self._fields.values())


def flatten(output: Any) -> tuple[list[torch.Tensor], OutputStructure]:
    """Take a model's output apart.

    Returns
    -------
    The tensors in order, and the structure that holds them.

    Raises
    ------
    BuildError
        The output holds something that a compiled artifact cannot return.

    Examples
    --------
    >>> leaves, structure = flatten((torch.zeros(2), {"n": 3}))
    >>> len(leaves), unflatten(leaves, structure)[1]
    (1, {'n': 3})
    """
    leaves: list[torch.Tensor] = []
    return leaves, _take_apart(output, leaves)


def _take_apart(value: Any, leaves: list[torch.Tensor]) -> OutputStructure:
    if isinstance(value, torch.Tensor):
        leaves.append(value)
        return {"kind": "tensor"}
    if value is None or isinstance(value, (bool, int, float, str)):
        return {"kind": "constant", "value": value}
    named = _fields(value)
    if named is not None:
        kind, fields = named
        items = [_take_apart(item, leaves) for item in fields.values()]
        return {"kind": kind, "keys": list(fields), "items": items, **_class_of(value, kind, fields)}
    if isinstance(value, (tuple, list)):
        kind = "list" if isinstance(value, list) else "tuple"
        return {"kind": kind, "items": [_take_apart(item, leaves) for item in value]}
    cached = _cached(value)
    if cached is not None:
        items = [_take_apart(item, leaves) for item in cached]
        return {"kind": "cache", "class": f"{type(value).__module__}:{type(value).__qualname__}", "items": items}
    raise BuildError(
        f"the model returned a {type(value).__qualname__}; expected tensors, numbers, strings, tuples, lists, dicts, a "
        "model-output class or a DynamicCache: return one of these from forward(), or leave it out, such as another "
        "cache with use_cache=False"
    )


def _cached(value: Any) -> list[torch.Tensor] | None:
    """Keys and values of each layer of a ``DynamicCache`` of plain layers, in turn; None for everything else."""
    kind = type(value)
    if kind.__name__ != "DynamicCache" or not kind.__module__.startswith("transformers."):
        return None
    layers = getattr(value, "layers", None)
    if not isinstance(layers, list) or not layers or {type(layer).__name__ for layer in layers} != {"DynamicLayer"}:
        return None
    found = [tensor for layer in layers for tensor in (layer.keys, layer.values)]
    return found if all(isinstance(tensor, torch.Tensor) for tensor in found) else None


def _fields(value: Any) -> tuple[str, dict[str, Any]] | None:
    if isinstance(value, Mapping):
        if not all(isinstance(key, str) for key in value):
            raise BuildError(f"the model returned a dict with keys {list(value)!r}; expected strings as keys")
        plain = type(value) is dict
        return ("dict" if plain else "mapping"), dict(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return "mapping", {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        return "namedtuple", dict(value._asdict())
    if isinstance(value, tuple) and type(value).__module__ == "torch.return_types":  # without _asdict
        kind: Any = type(value)
        return "namedtuple", dict(zip(kind.__match_args__, value, strict=True))
    return None


def _class_of(value: Any, kind: str, fields: dict[str, Any]) -> dict[str, Any]:
    """What tells the class of an output, so that it can be made again."""
    if kind == "dict":
        return {}
    described: dict[str, Any] = {"class": f"{type(value).__module__}:{type(value).__qualname__}"}
    if dataclasses.is_dataclass(value):
        names = [field.name for field in dataclasses.fields(value)]
        absent = [name for name in names if name not in fields and getattr(value, name, None) is None]
        if absent:
            described["absent"] = absent
    return described


def constants_of(structure: OutputStructure) -> list[str]:
    """The constants of an output in order, as JSON."""
    if structure["kind"] == "constant":
        return [json.dumps(structure["value"])]
    return [text for item in structure.get("items", ()) for text in constants_of(item)]


def unflatten(leaves: list[torch.Tensor], structure: OutputStructure) -> Any:
    """Put an artifact's flat output together as `flatten` has taken it apart.

    Parameters
    ----------
    leaves:
        The tensors, in the order and of the number that `flatten` gave; their shapes are free.
    structure:
        The structure that `flatten` gave.
    """
    iterator = iter(leaves)
    return _build(structure, iterator)


def _build(structure: OutputStructure, leaves: Iterator[torch.Tensor]) -> Any:
    kind = structure["kind"]
    if kind == "tensor":
        return next(leaves)
    if kind == "constant":
        return structure["value"]
    items = [_build(item, leaves) for item in structure["items"]]
    if kind == "cache":
        return _make_cache(structure, items)
    if kind == "tuple":
        return tuple(items)
    if kind == "list":
        return items
    made = _make(structure, items) if "class" in structure else None
    if made is not None:
        return made
    if kind == "namedtuple":
        return collections.namedtuple("Output", structure["keys"])(*items)
    fields = dict(zip(structure["keys"], items, strict=True))
    return fields if kind == "dict" else OutputMapping(fields, tuple(structure.get("absent", ())))


def _imported(structure: OutputStructure) -> Any:
    """The class of an output, if that is imported here; else None."""
    module, _, name = structure["class"].partition(":")
    try:
        kind = functools.reduce(getattr, name.split("."), sys.modules[module])
    except (KeyError, AttributeError):  # not imported, or a class inside a function
        return None
    return kind if isinstance(kind, type) else None


def _make_cache(structure: OutputStructure, items: list[Any]) -> Any:
    """A cache of the eager model's class; without that class a pair of keys and values for each layer."""
    pairs = tuple(zip(items[::2], items[1::2], strict=True))
    kind = _imported(structure)
    if kind is None:
        return pairs
    cache = kind()
    for index, (keys, values) in enumerate(pairs):
        cache.update(keys, values, index)
    return cache


def _make(structure: OutputStructure, items: list[Any]) -> Any:
    """An output of the eager model's class, if that is imported here and takes its fields; else None."""
    made = kind = _imported(structure)
    if kind is None:
        return None
    keys = structure["keys"]
    try:
        if issubclass(kind, tuple):
            return made(*items) if hasattr(kind, "_fields") else made(items)
        if dataclasses.is_dataclass(kind):
            return made(**dict(zip(keys, items, strict=True)))
        if issubclass(kind, Mapping):
            return made(dict(zip(keys, items, strict=True)))
    except Exception:  # its constructor takes something else
        return None
    return None

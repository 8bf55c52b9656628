"""Limits of inputs that a graph uses as indices into a table of a known size.

Eager code raises where an index is out of range, compiled code ends the process or answers with whatever lies there.
The graph shows the table's size wherever an input reaches a look-up unchanged, through views and wide integers only.
Not seen: an index that is computed (``ids - 1``), a table whose size is dynamic, and floating-point inputs.

In a description: ``"limits": {input: [low, high, where from]}``, half-open as the setting `limits`.
"""

from __future__ import annotations

from typing import Any

import torch

from ts_handlers.backends.base import Description
from ts_handlers.model.signature import Signature
from ts_handlers.settings import InputSpec

Limits = dict[str, tuple[int, int, str]]
"""Low (inclusive), high (exclusive) and where they are from, by input."""

_SHAPES = ("view", "reshape", "_unsafe_view", "flatten", "unflatten", "unsqueeze", "squeeze", "expand", "permute")
_ORDERS = ("transpose", "t", "contiguous", "clone", "alias", "detach", "lift_fresh_copy", "lift_fresh", "repeat")
_SAME_VALUES = frozenset([*_SHAPES, *_ORDERS, "expand_as", "view_as", "ravel", "swapaxes", "movedim"])
_CASTS = frozenset(["to", "_to_copy", "long", "int", "type_as"])
_WIDE = (torch.int32, torch.int64)


def find_limits(program: Any, signature: Signature) -> Limits:
    """The limits of a program's inputs; `program` is a `torch.export.ExportedProgram` of inputs in declared order."""
    nodes = {node.name: node for node in program.graph.nodes if node.op == "placeholder"}
    limits: Limits = {}
    for name, spec in zip(program.graph_signature.user_inputs, signature.inputs, strict=True):
        if name in nodes and spec.dtype in ("int32", "int64", "int16", "int8", "uint8"):
            for low, high, source in _uses(nodes[name], program.graph_signature):
                limits[spec.name] = _narrower(limits.get(spec.name), (low, high, source))
    return limits


def _narrower(a: tuple[int, int, str] | None, b: tuple[int, int, str]) -> tuple[int, int, str]:
    """What both allow; the source is that of the smaller table."""
    if a is None:
        return b
    return max(a[0], b[0]), min(a[1], b[1]), a[2] if a[1] <= b[1] else b[2]


def _uses(node: Any, signature: Any) -> list[tuple[int, int, str]]:
    """Every look-up that the values of a node reach unchanged."""
    found, pending, seen = [], [node], {node}
    while pending:
        current = pending.pop()
        for user in current.users:
            packet = getattr(user.target, "overloadpacket", None)
            name = str(packet).removeprefix("aten.") if user.op == "call_function" else ""
            keeps = name in _SAME_VALUES and user.args[:1] == (current,)
            keeps = keeps or (name in _CASTS and user.args[:1] == (current,) and _dtype(user) in _WIDE)
            if keeps and user not in seen:
                seen.add(user)
                pending.append(user)
            looked_up = _table(name, current, user)
            if looked_up is not None:
                table, dimension, negative = looked_up
                size = table.meta["val"].shape[dimension] if isinstance(table.meta.get("val"), torch.Tensor) else None
                if isinstance(size, int):
                    found.append((-size if negative else 0, size, f"{name} of {_described(table, size, signature)}"))
    return found


def _dtype(node: Any) -> torch.dtype | None:
    value = node.meta.get("val")
    return value.dtype if isinstance(value, torch.Tensor) else None


def _table(name: str, index: Any, user: Any) -> tuple[Any, int, bool] | None:
    """The table that `user` looks `index` up in, the dimension, and whether negative indices count from its end."""
    arguments = user.args
    if name in ("embedding", "embedding_bag", "_embedding_bag", "_embedding_bag_forward_only"):
        return (arguments[0], 0, False) if len(arguments) > 1 and arguments[1] is index else None
    if name in ("gather", "index_select"):
        return (arguments[0], arguments[1], False) if len(arguments) > 2 and arguments[2] is index else None
    if name == "index" and index in arguments[1] and _dtype(index) in _WIDE:  # one of uint8 is a mask
        positions = [position for position, each in enumerate(arguments[1]) if each is index]
        return arguments[0], positions[0], True
    return None


def _described(table: Any, size: int, signature: Any) -> str:
    names = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    owner = names.get(table.name, "").removeprefix("model.")
    return f"{owner} ({size})" if owner else f"a table of {size}"


def merge_limits(description: Description, found: Limits) -> None:
    """Add the limits of a variant to a description."""
    limits = description.setdefault("limits", {})
    for name, limit in found.items():
        before = limits.get(name)
        limits[name] = list(_narrower(None if before is None else tuple(before), limit))
    if not limits:
        del description["limits"]


def with_limits(signature: Signature, description: Description) -> Signature:
    """A signature with the limits that a build has found, where the user has set none."""
    found = description.get("limits", {})
    if not any(spec.name in found and spec.limits is None for spec in signature.inputs):
        return signature
    inputs = [_limited(spec, found.get(spec.name)) for spec in signature.inputs]
    undeclared = [spec.name for spec in signature.inputs if spec.limits is None and spec.name in found]
    return Signature(inputs, signature.dimensions, signature.kind, undeclared)


def _limited(spec: InputSpec, found: list[Any] | None) -> InputSpec:
    import msgspec

    if found is None or spec.limits is not None:
        return spec
    low, high, _ = found
    # Drawn as without limits, as far as these allow it: eager may know reasons of its own against other values.
    values = spec.values if spec.values is not None else (max(0, low), min(2, high))
    return msgspec.structs.replace(spec, limits=(low, high), values=values)


def limit_facts(description: Description, declared: Signature | None) -> dict[str, Any]:
    """For `describe`: under ``limits`` the limits that hold, and where each is from; nothing where there are none."""
    own = set() if declared is None else {spec.name for spec in declared.inputs if spec.limits is not None}
    found = description.get("limits", {})
    shown = {
        name: {"limits": [low, high], "from": source} for name, (low, high, source) in found.items() if name not in own
    }
    specs = [] if declared is None else [spec for spec in declared.inputs if spec.name in own]
    shown.update({spec.name: {"limits": list(spec.limits or ()), "from": "settings"} for spec in specs})
    return {"limits": shown} if shown else {}

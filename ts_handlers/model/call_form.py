"""Calls of another form than the declared inputs: flags, None, containers, arguments that nobody has declared.

An artifact takes the declared tensors and nothing else. A call that hands over something else is no mistake of a
request: the handler's code makes it, and the eager module takes it.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ts_handlers.errors import one_line
from ts_handlers.model.signature import Signature


def other_form(signature: Signature, args: Sequence[Any], kwargs: Mapping[str, Any]) -> str | None:
    """In what the arguments of a call differ from the declared inputs beside shapes and values; None when in nothing.

    Examples
    --------
    >>> from ts_handlers.settings import InputSpec
    >>> signature = Signature([InputSpec("x", "float32", (2,))], {})
    >>> other_form(signature, [torch.zeros(2)], {"return_dict": False})
    "argument 'return_dict' is not declared"
    >>> other_form(signature, [torch.zeros(3)], {})
    """
    names = signature.names
    if len(args) > len(names):
        return f"{len(args)} arguments by position, {len(names)} inputs declared"
    given = given_by_name(signature, args, kwargs)
    for name in kwargs:
        if name not in names:
            return one_line(f"argument {name!r} is not declared", 200)
    for spec in signature.inputs:
        if spec.name not in given:
            return f"without input {spec.name!r}"
        value = given[spec.name]
        if not isinstance(value, torch.Tensor):
            return f"input {spec.name!r} is a {type(value).__name__}"
        if value.dtype != getattr(torch, spec.dtype):
            return f"input {spec.name!r} is {str(value.dtype)[6:]}, declared is {spec.dtype}"
        if value.layout != torch.strided:
            return f"input {spec.name!r} has the layout {str(value.layout)[6:]}"
    return None


def given_by_name(signature: Signature, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call, those by position under the names that they have in declared order."""
    return {**dict(zip(signature.names, args, strict=False)), **kwargs}


def accepts(module: torch.nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether `module.forward` can be called with these arguments, as far as its parameters tell."""
    try:
        inspect.signature(module.forward).bind(*args, **kwargs)
    except TypeError:
        return False
    except ValueError:  # nothing is known of its parameters
        return True
    return True


def forward_order(module: torch.nn.Module, names: Sequence[str]) -> tuple[str, ...] | None:
    """The names by which `module.forward` takes arguments by position, when the first ones are not `names`, else None.

    None as well when `names` are not names of its parameters: then they are read in declared order.
    """
    try:
        parameters = inspect.signature(module.forward).parameters.values()
    except (TypeError, ValueError):
        return None
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    order = tuple(parameter.name for parameter in parameters if parameter.kind in kinds)
    if not set(names) <= set(order) or order[: len(names)] == tuple(names):
        return None
    return order


def to_device(value: Any, device: torch.device) -> Any:
    """The same value with the tensors in it on `device`, in containers of the same classes; itself if nothing moves."""
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, (tuple, list)):
        items = [to_device(item, device) for item in value]
        if all(new is old for new, old in zip(items, value, strict=True)):
            return value
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if isinstance(value, Mapping):
        moved = {key: to_device(item, device) for key, item in value.items()}
        changed = {key: item for key, item in moved.items() if item is not value[key]}
        if not changed:
            return value
        if type(value) is dict:
            return moved
        if hasattr(value, "to"):  # such as transformers' BatchEncoding, whose copy would share its dict
            return value.to(device)
        other: Any = copy.copy(value)
        for key, item in changed.items():
            other[key] = item
        return other
    return value

"""How a module takes the declared inputs: by name, by position, or as one mapping or sequence of them."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch

from ts_handlers.errors import SettingsError
from ts_handlers.settings import SECTION

Passing = Literal["names", "position", "mapping", "list", "tuple"]

_MAPPING = re.compile(r"\b(dict|\w*Dict|\w*Mapping|BatchEncoding|BatchFeature)\b")
_LIST = re.compile(r"\b(list|List|Sequence|Iterable)\b")
_TUPLE = re.compile(r"\b(tuple|Tuple)\b")


def call_module(module: Callable[..., Any], names: tuple[str, ...], tensors: list[torch.Tensor], how: Passing) -> Any:
    """Call a module with tensors in declared order, as `takes_names` says."""
    if how == "names":
        return module(**dict(zip(names, tensors, strict=True)))
    if how == "mapping":
        return module(dict(zip(names, tensors, strict=True)))
    if how == "list":
        return module(list(tensors))
    return module(tuple(tensors)) if how == "tuple" else module(*tensors)


def takes_names(module: torch.nn.Module, names: tuple[str, ...]) -> Passing:
    """How `module.forward` takes inputs of these names.

    By name where it has parameters of all these names, or takes any name and nothing by position; as one mapping or
    sequence where that is its only parameter; otherwise by position.
    """
    signature = _signature(module)
    if signature is None:
        return "position"
    if _has_names(signature, names):
        return "names"
    if not _binds(signature, *names) and _binds(signature, **dict.fromkeys(names)):
        return "names"
    return _together(signature, names) or "position"


def check_names(module: torch.nn.Module, names: tuple[str, ...]) -> None:
    """Refuse declared inputs that no call of `module.forward` can take.

    Raises
    ------
    SettingsError
        With the parameters that `forward` has.
    """
    signature = _signature(module)
    if signature is None:
        return
    how = takes_names(module, names)
    fits = _binds(signature, **dict.fromkeys(names)) if how == "names" else _binds(signature, *names)
    if how in ("mapping", "list", "tuple"):
        fits = True
    parameters = list(signature.parameters)
    swapped = [
        name
        for index, name in enumerate(names)
        if how == "position" and name in parameters[:index] + parameters[index + 1 :]
    ]
    if fits and not swapped:
        return
    from ts_handlers.model.proposal import proposal_text

    raise SettingsError(
        f"{SECTION}.inputs: forward of {type(module).__name__} takes {signature}, which does not fit the inputs "
        f"{', '.join(names)}; declare an input for each parameter without a default, under the parameter's name"
        f"{proposal_text(lambda: module)}"
    )


def _signature(module: torch.nn.Module) -> inspect.Signature | None:
    try:
        return inspect.signature(module.forward)
    except (TypeError, ValueError):
        return None


def _has_names(signature: inspect.Signature, names: Sequence[str]) -> bool:
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    parameters = signature.parameters
    return all(name in parameters and parameters[name].kind in kinds for name in names)


def _together(signature: inspect.Signature, names: Sequence[str]) -> Passing | None:
    """What the only parameter that must be given takes, when it is not a tensor."""
    parameters = list(signature.parameters.values())
    if any(parameter.kind == inspect.Parameter.VAR_POSITIONAL for parameter in parameters):
        return None
    positional = [parameter for parameter in parameters if parameter.kind not in _NAMED]
    required = [parameter for parameter in positional if parameter.default is inspect.Parameter.empty]
    if len(required) != 1 or positional[0] is not required[0]:
        return None
    annotation = required[0].annotation
    if isinstance(annotation, type) and issubclass(annotation, Mapping):
        return "mapping"
    text = annotation if isinstance(annotation, str) else f"{getattr(annotation, '__name__', '')} {annotation}"
    if annotation is not inspect.Parameter.empty:
        if _MAPPING.search(text):
            return "mapping"
        if _LIST.search(text):
            return "list"
        if _TUPLE.search(text):
            return "tuple"
        return None
    # Without an annotation: several inputs cannot be given to a single parameter otherwise.
    return "mapping" if len(names) > len(positional) else None


_NAMED = (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.VAR_KEYWORD)


def _binds(signature: inspect.Signature, *args: Any, **kwargs: Any) -> bool:
    try:
        signature.bind(*args, **kwargs)
    except TypeError:
        return False
    return True


def spreads(module: torch.nn.Module, data: Any) -> bool:
    """Whether a call with undeclared inputs gives `forward` the elements of a tuple, list or mapping, or all of it.

    A mapping and a tuple are given as arguments where `forward` takes those, a list only where it does not take one.

    Examples
    --------
    >>> linear = torch.nn.Linear(2, 1)
    >>> spreads(linear, {"input": 1}), spreads(linear, {"x": 1}), spreads(linear, [1]), spreads(linear, (1, 2))
    (True, False, False, False)
    """
    signature = _signature(module)
    if signature is None:
        return True
    if isinstance(data, Mapping):
        return all(isinstance(name, str) for name in data) and _binds(signature, **data)
    if not isinstance(data, (tuple, list)) or (isinstance(data, list) and _binds(signature, data)):
        return False
    return _binds(signature, *data)

"""What a module holds beside its code, to find out what a run has changed and to put it back.

Checks and warm-up run the eager module, and some backends serve that very module afterwards. A model that keeps
something between calls (a counter, a cache, running statistics) must not begin to serve with what the checks have left.

Seen are the tensors, and what can be reached from the attributes of the module and its submodules: numbers, texts,
lists, dicts, sets and plain objects. Not seen are global variables, attributes of classes, what a function's closure
holds, what happens inside objects of the standard library and of C, and a change through `Tensor.data` of a tensor that
is too large to be copied.
"""

from __future__ import annotations

import functools
import logging
import re
import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

logger = logging.getLogger(__name__)

COPIED_BYTES = 1 << 20
"""Tensors up to this size are copied. A larger one is compared by its version, and put back from the weights."""
DEEPEST = 4
"""How many plain objects lie one in the other at most."""
_PLAIN = (type(None), bool, int, float, complex, str, bytes)


class ModuleState:
    """The state of a module at the moment when this object is made.

    Attributes
    ----------
    module:
        The module.
    """

    def __init__(self, module: torch.nn.Module) -> None:
        self.module = module
        self._holders: list[tuple[str, Any, Any]] = []  # path, a container or an object's attributes, a shallow copy
        self._tensors: list[tuple[str, torch.Tensor, int | None, torch.Tensor | None]] = []
        self._seen: set[int] = set()
        for name, child in module.named_modules():
            self._add(f"{name}." if name else "", vars(child), 0)

    def _add(self, path: str, value: Any, depth: int) -> None:
        if isinstance(value, _PLAIN) or id(value) in self._seen:
            return
        if isinstance(value, torch.Tensor):
            self._seen.add(id(value))
            if value.layout != torch.strided:  # a sparse one, which nothing can be copied into
                return
            version = _version(value)
            copied = version is None or value.nbytes <= COPIED_BYTES
            self._tensors.append((path, value, version, value.detach().clone() if copied else None))
        elif isinstance(value, (dict, list, set, deque)):
            self._seen.add(id(value))
            kind = dict if isinstance(value, dict) else set if isinstance(value, set) else list
            self._holders.append((path, value, kind(value)))
            for key, item in _items(value):
                self._add(_join(path, key), item, depth)
        elif isinstance(value, tuple):
            for key, item in enumerate(value):
                self._add(_join(path, key), item, depth)
        elif depth < DEEPEST and _is_plain_object(value):
            self._seen.add(id(value))
            self._add(f"{path}.", vars(value), depth + 1)

    def changes(self) -> list[str]:
        """Names of the attributes and tensors that are not as they were."""
        found = [
            name for path, holder, before in self._holders for name in _differences(path, holder, before, self.module)
        ]
        found += [_shown(name) for name, tensor, version, copy in self._tensors if _has_changed(tensor, version, copy)]
        return list(dict.fromkeys(found))

    def restore(self, weights: Mapping[str, torch.Tensor]) -> list[str]:
        """Put everything back; returns the names of the tensors for which that was not possible.

        Parameters
        ----------
        weights:
            The state dict from which large tensors are put back.
        """
        for path, holder, before in self._holders:
            if next(_differences(path, holder, before, self.module), None) is None:
                continue
            if isinstance(holder, dict):
                for key in [key for key in holder if key not in before and not str(key).startswith("_dynamo")]:
                    del holder[key]
                holder.update(before)
            elif isinstance(holder, list):
                holder[:] = before
            else:
                holder.clear()
                getattr(holder, "update" if isinstance(holder, set) else "extend")(before)
        lost = []
        for name, tensor, version, copy in self._tensors:
            if not _has_changed(tensor, version, copy):
                continue
            source = weights.get(_in_state_dict(name)) if copy is None else copy
            if source is None or source.data_ptr() == tensor.data_ptr() or source.shape != tensor.shape:
                lost.append(name)
                continue
            with torch.inference_mode(tensor.is_inference()), torch.no_grad():
                tensor.copy_(source)
        return lost


def _in_state_dict(path: str) -> str:
    """The name in a state dict of a tensor whose path is ``layer._parameters['weight']``."""
    return re.sub(r"_(?:parameters|buffers)\['([^']*)'\]", r"\1", path)


def _shown(path: str) -> str:
    return _in_state_dict(path).lstrip(".")


def _join(path: str, key: Any) -> str:
    if path.endswith(".") or not path:
        return f"{path}{key}"
    return f"{path}[{str(key)[:40]!r}]" if isinstance(key, str) else f"{path}[{str(key)[:40]}]"


def _items(value: Any) -> Iterator[tuple[Any, Any]]:
    return iter(list(value.items())) if isinstance(value, dict) else iter(list(enumerate(value)))


def _is_plain_object(value: Any) -> bool:
    kind = type(value)
    package = kind.__module__.partition(".")[0]
    if package == "torch" or (package in sys.stdlib_module_names and package != "types"):
        return False
    return not isinstance(value, (type, torch.nn.Module)) and not callable(value) and hasattr(value, "__dict__")


def _differences(path: str, holder: Any, before: Any, module: torch.nn.Module) -> Iterator[str]:
    if isinstance(holder, dict):
        keys = [*before, *(key for key in holder if key not in before)]
        for key in keys:
            if key not in before and _is_cached(holder, key, module):
                continue
            if key not in holder or key not in before or not _same(holder[key], before[key]):
                yield _shown(_join(path, key))
    elif isinstance(holder, set):
        if holder != before:
            yield _shown(path)
    elif len(holder) != len(before) or not all(map(_same, holder, before)):
        yield _shown(path)


def _is_cached(holder: dict[Any, Any], key: Any, module: torch.nn.Module) -> bool:
    """Whether a new attribute is the value of a `functools.cached_property`, which says the same each time."""
    owners = [child for child in module.modules() if vars(child) is holder]
    return any(isinstance(getattr(type(owner), str(key), None), functools.cached_property) for owner in owners)


def _same(a: Any, b: Any, depth: int = 0) -> bool:
    """Whether two values are one, or are equal texts, numbers and containers: torch.export replaces containers."""
    if a is b:
        return True
    if type(a) is not type(b) or depth > DEEPEST:
        return False
    if isinstance(a, (tuple, list)):
        return len(a) == len(b) and all(_same(one, other, depth + 1) for one, other in zip(a, b, strict=True))
    if isinstance(a, dict):
        return list(a) == list(b) and all(_same(a[key], b[key], depth + 1) for key in a)
    return isinstance(a, _PLAIN) and repr(a) == repr(b)


def _version(tensor: torch.Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version


def _has_changed(tensor: torch.Tensor, version: int | None, copy: torch.Tensor | None) -> bool:
    if copy is None or tensor.layout != torch.strided:
        return _version(tensor) != version
    if _version(tensor) == version and version is not None and tensor.device.type != "cpu":
        return False  # a comparison would wait for the device
    return tensor.shape != copy.shape or not _equal(tensor.detach(), copy)


def _equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a, b) or bool(((a == b) | ((a != a) & (b != b))).all())


def put_back(state: ModuleState | None, weights: Callable[[], Mapping[str, torch.Tensor]]) -> None:
    """Restore a module and log what could not be restored."""
    if state is None or not state.changes():
        return
    lost = state.restore(weights())
    if lost:
        logger.warning("the checks have changed %s, which cannot be put back", ", ".join(map(_shown, lost[:5])))


def numbers_of(module: torch.nn.Module) -> dict[str, str]:
    """The numbers among the attributes of a module and its submodules, by dotted name, as texts."""
    return {
        f"{name}.{key}".lstrip("."): repr(value)
        for name, child in module.named_modules()
        for key, value in vars(child).items()
        if key != "training" and _is_number(value)
    }


def _is_number(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return len(value) <= 16 and all(map(_is_number, value))
    return isinstance(value, (bool, int, float, complex))

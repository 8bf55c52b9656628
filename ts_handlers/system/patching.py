"""Replacing an attribute of somebody else's module or class for a while, and hiding modules from imports.

Both change what the whole process sees: a replacement that must not reach other threads has to look where it runs.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

_ABSENT = object()


@contextlib.contextmanager
def replaced_attribute(owner: Any, name: str, value: Any, *, optional: bool = False) -> Iterator[None]:
    """Inside the block ``owner.name`` is `value`; afterwards `owner` has exactly what it had before.

    Parameters
    ----------
    owner:
        A module or a class. An attribute that a class inherits is inherited again after the block.
    value:
        What takes its place: in a class a function, or a ``staticmethod``.
    optional:
        Where `owner` is None or has no such attribute, change nothing.

    Raises
    ------
    AttributeError
        `owner` has no such attribute, and it is not `optional`.

    Examples
    --------
    >>> import math
    >>> with replaced_attribute(math, "pi", 3):
    ...     math.pi
    3
    >>> math.pi > 3
    True
    """
    if not hasattr(owner, name):
        if not optional:
            raise AttributeError(f"{owner!r} has no attribute {name!r} that could be replaced")
        yield
        return
    before = vars(owner).get(name, _ABSENT)  # not getattr, which would turn a staticmethod into a function
    setattr(owner, name, value)
    try:
        yield
    finally:
        if before is _ABSENT:
            delattr(owner, name)
        else:
            setattr(owner, name, before)


def hide_module(name: str) -> None:
    """Make every import of a module raise ModuleNotFoundError from now on, whether it is installed or not."""
    sys.modules[name] = None  # type: ignore[assignment]


@contextlib.contextmanager
def hidden_modules(*names: str) -> Iterator[None]:
    """Inside the block importing these modules raises ModuleNotFoundError; one that is imported already stays.

    Examples
    --------
    >>> with hidden_modules("antigravity"):
    ...     try:
    ...         import antigravity
    ...     except ModuleNotFoundError:
    ...         print("hidden")
    hidden
    """
    hidden = [name for name in names if name not in sys.modules]
    for name in hidden:
        hide_module(name)
    try:
        yield
    finally:
        for name in hidden:
            sys.modules.pop(name, None)

"""Seeing what code reads while a block runs: files that it opens, folders that it lists, environment variables.

Files are seen by Python's audit hook, which tells of every `open`, of `os.open` and of listings; native readers that
open files by themselves are wrapped (`_NATIVE`). A hook stays until the process ends and slows every call that Python
audits, of which tracing a model makes hundreds of thousands. So where not every read must be seen, the functions that
open and list are wrapped instead (`_OPENERS`). Variables are seen where `os.environ` looks one up.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
import sys
import threading
import types
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

from ts_handlers.system.patching import replaced_attribute

# Readers that open a file in native code, with the position of its path among their arguments.
_NATIVE = (("safetensors", "safe_open", 0), ("torch._C", "import_ir_module", 1))
# The functions of the standard library that open and list, by what the audit hook calls them.
_OPENERS = (
    ("builtins", "open", "open"),
    ("io", "open", "open"),
    ("os", "open", "os.open"),
    ("os", "listdir", "os.listdir"),
    ("os", "scandir", "os.scandir"),
)

_active: list[Listener] = []
_hooked = False
_busy = threading.local()


class Listener(Protocol):
    """Is told of reads, with the frame of the code that reads; what it reads itself is not told."""

    def heeds_this_thread(self) -> bool:
        """Whether it is to be told of what the running thread reads."""

    def note_open(self, path: Any, mode: Any, flags: Any, frame: types.FrameType | None) -> None:
        """A file is about to be opened; arguments as of the audit event ``open``."""

    def note_listing(self, path: Any, frame: types.FrameType | None) -> None:
        """A folder is about to be listed."""

    def note_variable(self, key: Any, frame: types.FrameType | None) -> None:
        """A variable is about to be looked up."""

    def note_enumeration(self, keys: Iterable[str]) -> None:
        """All variables are about to be listed."""


@contextlib.contextmanager
def watched(listener: Listener, *, complete: bool) -> Iterator[None]:
    """Tell a listener what the block reads.

    Parameters
    ----------
    complete:
        Whether every read must be seen, at the price of a hook that stays.
    """
    with contextlib.ExitStack() as stack:
        if complete or _hooked:
            _install_hook()
        else:
            stack.enter_context(_openers_watched())
        stack.enter_context(_variables_watched())
        for module, name, position in _NATIVE:
            stack.enter_context(_native_watched(module, name, position))
        _active.append(listener)
        stack.callback(_active.remove, listener)
        yield


def _install_hook() -> None:
    global _hooked
    if not _hooked:
        _hooked = True  # a hook stays until the process ends
        sys.addaudithook(_hook)


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if not _active:
        return
    if event == "open":
        path, mode, flags = arguments[:3]
        _tell(lambda listener, frame: listener.note_open(path, mode, flags, frame))
    elif event in ("os.listdir", "os.scandir"):
        _tell(lambda listener, frame: listener.note_listing(arguments[0], frame))
    elif event in ("sqlite3.connect", "ctypes.dlopen") and os.path.isabs(str(arguments[0])):
        _tell(lambda listener, frame: listener.note_open(arguments[0], "r", 0, frame))


def _tell(note: Callable[[Listener, types.FrameType | None], None]) -> None:
    frame = sys._getframe(2)
    if getattr(_busy, "noting", False):  # what a listener itself opens
        return
    _busy.noting = True
    try:
        for listener in tuple(_active):
            if listener.heeds_this_thread():
                with contextlib.suppress(OSError, ValueError):  # of a path that cannot be opened either
                    note(listener, frame)
    finally:
        _busy.noting = False


class _WatchedOpener:
    """A function that opens or lists. A class that has it as an attribute does not make it a method, as of one in C."""

    def __init__(self, event: str, original: Callable[..., Any]) -> None:
        self._event = event
        functools.update_wrapper(self, original)

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        path = arguments[0] if arguments else keywords.get("file", keywords.get("path"))
        second = arguments[1] if len(arguments) > 1 else None
        if self._event == "open":
            mode = keywords.get("mode", "r") if second is None else second
            _tell(lambda listener, frame: listener.note_open(path, mode, 0, frame))
        elif self._event == "os.open":
            flags = keywords.get("flags", 0) if second is None else second
            _tell(lambda listener, frame: listener.note_open(path, None, flags, frame))
        else:
            _tell(lambda listener, frame: listener.note_listing(path, frame))
        return self.__wrapped__(*arguments, **keywords)  # type: ignore[attr-defined]


@contextlib.contextmanager
def _openers_watched() -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for module, name, event in _OPENERS:
            owner = sys.modules[module]
            stack.enter_context(replaced_attribute(owner, name, _WatchedOpener(event, getattr(owner, name))))
        yield


@contextlib.contextmanager
def _variables_watched() -> Iterator[None]:
    kind: Any = os._Environ
    get, iterate = kind.__getitem__, kind.__iter__

    def watched_get(self: Any, key: Any) -> Any:
        _tell(lambda listener, frame: listener.note_variable(key, frame))
        return get(self, key)

    def watched_iterate(self: Any) -> Iterator[Any]:
        keys = list(iterate(self))
        _tell(lambda listener, frame: listener.note_enumeration(map(os.fsdecode, keys)))
        return iter(keys)

    with replaced_attribute(kind, "__getitem__", watched_get), replaced_attribute(kind, "__iter__", watched_iterate):
        yield


@contextlib.contextmanager
def _native_watched(module: str, name: str, position: int) -> Iterator[None]:
    """Inside the block calls of a native reader are seen, by whatever module it was imported."""
    try:
        original = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError):
        yield
        return

    @functools.wraps(original, updated=())
    def watched(*arguments: Any, **keywords: Any) -> Any:
        path = arguments[position] if len(arguments) > position else keywords.get("filename")
        _tell(lambda listener, frame: listener.note_open(path, "r", 0, frame))
        return original(*arguments, **keywords)

    _replace_everywhere(name, original, watched)
    try:
        yield
    finally:
        _replace_everywhere(name, watched, original)


def _replace_everywhere(name: str, old: Any, new: Any) -> None:
    for module in list(sys.modules.values()):
        if isinstance(module, types.ModuleType) and vars(module).get(name) is old:
            setattr(module, name, new)

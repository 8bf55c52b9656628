"""Reading the files of an archive: weights by name, the model file's class, and what a source file imports."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import os
import sys
import threading
import zipfile
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from ts_handlers.errors import ModelError
from ts_handlers.key import fingerprint

Tensors = dict[str, torch.Tensor]


def read_weights(path: Path, *, mmap: bool) -> Tensors:
    """Read a state dict from ``.pt``, ``.pth`` or ``.safetensors``.

    Raises
    ------
    ModelError
        The file is truncated, holds something else than tensors by name, or needs unpickling of foreign classes.
    """
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load, load_file

            state = load_file(path) if mmap else load(path.read_bytes())
        else:
            state = _torch_load(path, mmap)
    except ImportError as error:
        raise ModelError(f"{path.name} needs the package safetensors: pip install safetensors") from error
    except Exception as error:
        raise ModelError(
            f"the weights file {path.name} ({os.path.getsize(path)} bytes) cannot be read: "
            f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}; it may be truncated, or hold "
            "more than tensors: save it with torch.save(model.state_dict(), ...)"
        ) from error
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise ModelError(
            f"{path.name} holds a {type(state).__name__}, expected a state dict (tensors by name); "
            "save it with torch.save(model.state_dict(), ...)"
        )
    return dict(state)


def _torch_load(path: Path, mmap: bool) -> Any:
    if mmap and zipfile.is_zipfile(path):
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    return torch.load(path, map_location="cpu", weights_only=True)


def load_model_class(path: Path) -> type[torch.nn.Module]:
    """Import a model file and return the one `nn.Module` class that it defines.

    TorchServe's rule: exactly one class. Helper classes that are not modules, and modules that the file merely
    imports, do not count; of several module classes the one marked ``__model__ = True`` is taken.

    A file is executed once in a process as long as its content stays the same: executed twice it would define its
    operators again, under libraries that hold the first ones, which ends the process.
    """
    with _executing:
        module = _execute(path)
    name = module.__name__
    classes = [
        value
        for value in vars(module).values()
        if inspect.isclass(value) and issubclass(value, torch.nn.Module) and value.__module__ == name
    ]
    marked = [value for value in classes if vars(value).get("__model__") is True]
    if len(marked) == 1:
        return marked[0]
    if len(classes) != 1:
        found = ", ".join(value.__name__ for value in classes) or "none"
        raise ModelError(
            f"{path.name}: expected exactly one nn.Module class, found {len(classes)} ({found}); move the others to "
            "another file, or mark the model's class with `__model__ = True`"
        )
    return classes[0]


_executing = threading.RLock()
_DIGEST = "__ts_handlers_digest__"


def _execute(path: Path) -> ModuleType:
    """The module of a model file, executed unless it is already there with this content."""
    name = f"ts_handlers_model_{fingerprint.digest_text(str(path))[:12]}"
    directory = str(path.parent)
    added = directory not in sys.path
    if added:
        sys.path.insert(0, directory)
    try:
        digest = fingerprint.digest_file(path)
        known = sys.modules.get(name)
        if known is not None and getattr(known, _DIGEST, None) == digest:
            return known
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
        setattr(module, _DIGEST, digest)
    except Exception as error:
        raise ModelError(f"{path.name} cannot be imported: {type(error).__name__}: {error}") from error
    finally:
        if added:
            sys.path.remove(directory)
    return module


def imported_modules(path: Path) -> set[str]:
    """Top-level names of the absolute imports anywhere in a file."""
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError):
        return set()
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names.add(node.module.partition(".")[0])
    return names

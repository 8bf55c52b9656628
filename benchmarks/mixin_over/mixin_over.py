"""Put the mixin over the handlers that somebody else's tests use, as the two lines would.

As a plugin of pytest (``-p mixin_over``) it replaces the handler classes that a test module has imported. In workers of
TorchServe, `sitecustomize` beside this file replaces what the model loader finds in a handler file.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import inspect
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

LOADER = "ts.model_loader"
_put_over: list[str] = []


def over(kind: type) -> type:
    """The two lines over a handler class."""
    from ts_handlers import CompiledHandlerMixin

    _put_over.append(kind.__name__)
    return type(f"Warm{kind.__name__}", (CompiledHandlerMixin, kind), {"__module__": kind.__module__})


def over_function(function: Any) -> type:
    """The same over a handler that is a function at module level."""
    from ts_handlers import CompiledHandlerMixin, FunctionHandler

    members = {"function": staticmethod(function), "__module__": function.__module__}
    return type("WarmFunction", (CompiledHandlerMixin, FunctionHandler), members)


def is_handler(value: Any) -> bool:
    """Whether a value is a handler class that the mixin is not over yet."""
    if not inspect.isclass(value) or not all(hasattr(value, name) for name in ("initialize", "handle")):
        return False
    return all(base.__module__.partition(".")[0] != "ts_handlers" for base in value.__mro__)


def pytest_pycollect_makeitem(collector: Any, name: str, obj: Any) -> None:
    """Replace the handler classes among a test module's globals before its first test is made."""
    module = collector.obj if inspect.ismodule(collector.obj) else None
    if module is None or getattr(module, "_mixin_over", False):
        return
    module._mixin_over = True
    for each, value in list(vars(module).items()):
        if is_handler(value):
            setattr(module, each, over(value))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Say over which handlers the mixin was."""
    terminalreporter.write_line(f"the mixin was over: {', '.join(_put_over) or 'no class of the test module'}")


def patch_loader(loader: ModuleType) -> None:
    """Make TorchServe's model loader find the two lines over what it would find."""
    found_in = loader.list_classes_from_module

    def list_classes_from_module(module: ModuleType, parent_class: type | None = None) -> list[type]:
        return [over(kind) if is_handler(kind) else kind for kind in found_in(module, parent_class)]

    def function_entry_point(self: Any, module: ModuleType, function_name: str) -> Any:
        handler: Any = over_function(getattr(module, function_name))()
        return handler.handle, handler.initialize

    loader.list_classes_from_module = list_classes_from_module  # type: ignore[attr-defined]
    loader.TsModelLoader._get_function_entry_point = function_entry_point


class PatchingFinder(importlib.abc.MetaPathFinder):
    """Patches TorchServe's model loader when a process imports it."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """See `importlib.abc.MetaPathFinder`."""
        if name != LOADER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is None or spec.loader is None:
            return spec
        run: Any = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            run(module)
            patch_loader(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec

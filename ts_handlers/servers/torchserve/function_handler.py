"""A handler that is a function at module level, as a class: so the two lines can stand over it.

TorchServe calls such a function with None and its context once, for the function to load its model, and then with each
batch. The model lies in the function's module: as a variable ``model``, or as the attribute ``model`` of an object that
the module made, often called ``_service``.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from typing import Any

import torch


class FunctionHandler:
    """Calls a function of somebody's module as TorchServe does::

        import their_handler
        from ts_handlers import CompiledHandlerMixin, FunctionHandler


        class Handler(CompiledHandlerMixin, FunctionHandler):
            function = staticmethod(their_handler.handle)

    `model` is the module's own: it is swapped where it lies. It is None when the function's module holds no
    `torch.nn.Module` after the first call, or holds several.
    """

    function: Callable[[Any, Any], Any]
    _holder: Any = None

    def initialize(self, context: Any) -> None:
        """Let the function load its model, as TorchServe does: an asynchronous one is called and not awaited."""
        given = self.function(None, context)
        if inspect.iscoroutine(given):
            given.close()
        holders = _holders(sys.modules.get(getattr(self.function, "__module__", None) or ""))
        self._holder = holders[0] if len(holders) == 1 else None

    @property
    def handle(self) -> Callable[[Any, Any], Any]:
        """The function, which may be asynchronous."""
        return self.function

    @property
    def model(self) -> Any:
        """The model that the function calls; assigning swaps it there."""
        return None if self._holder is None else self._holder.model

    @model.setter
    def model(self, value: Any) -> None:
        if self._holder is not None:
            self._holder.model = value


def _holders(module: Any) -> list[Any]:
    """What in a module holds a model: the module itself, or objects that it has made."""
    members = {} if module is None else vars(module)
    found = [module] if isinstance(members.get("model"), torch.nn.Module) else []
    for value in list(members.values()):
        if isinstance(value, (type, torch.nn.Module)) or not hasattr(value, "__dict__"):
            continue
        if isinstance(vars(value).get("model"), torch.nn.Module) and all(value is not each for each in found):
            found.append(value)
    return found

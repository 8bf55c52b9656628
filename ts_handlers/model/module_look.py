"""What makes an object that answers in a module's place look like that module to the code around it.

Handlers ask their model for more than a call: its ``config``, ``device`` and ``parameters()``, a submodule,
``generate``, whether it is a `torch.nn.Module`. All of that is the eager module's.
"""

from __future__ import annotations

import copy
from typing import Any

import torch


class ModuleLook:
    """Looks like the module that `_eager_module` returns, without being one.

    What the class itself defines is its own. Every other attribute is the module's, at the cost of building it at the
    first use. ``isinstance(served, torch.nn.Module)`` is True and builds nothing; the module's own class is told once
    it is there. A copy or a pickle is one of the module.
    """

    def _eager_module(self) -> torch.nn.Module:
        """The eager module; builds it when it is not there yet."""
        raise NotImplementedError

    def _module_at_hand(self) -> torch.nn.Module | None:
        """The eager module if it is there."""
        raise NotImplementedError

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        module = self._module_at_hand()
        return torch.nn.Module if module is None else type(module)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name.endswith("__"):  # Python asks for them to find out what an object can do
            raise AttributeError(name)
        return getattr(self._eager_module(), name)

    def __getitem__(self, key: Any) -> Any:
        module: Any = self._eager_module()
        return module[key]

    def __copy__(self) -> Any:
        return copy.copy(self._eager_module())

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return copy.deepcopy(self._eager_module(), memo)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self._eager_module().__reduce_ex__(protocol)

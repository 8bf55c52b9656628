"""Changes of a model after its start: they act on the module that serves, or raise because nothing would see them."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any, Protocol, Self

import torch

from ts_handlers.errors import FrozenModelError
from ts_handlers.model.base import ModelSource
from ts_handlers.model.module_look import ModuleLook
from ts_handlers.settings import Settings

logger = logging.getLogger(__name__)


class MadeFor(Protocol):
    """What a model was started for; `ts_handlers.backends.base.Target` is one."""

    @property
    def source(self) -> ModelSource:
        """Where the model comes from."""

    @property
    def settings(self) -> Settings:
        """The user's settings."""

    def eager(self) -> torch.nn.Module:
        """The eager module."""


class GuardedModel(ModuleLook):
    """A model that looks like its eager module.

    Changes (`load_state_dict`, hooks, casts, assignments) reach the eager module where it serves: with
    ``backends: [eager]``, and while answers are explained. Elsewhere they raise `FrozenModelError`. What a handler does
    to a part of the module that it has got from here cannot be seen; that is logged as a warning.
    """

    def __init__(self, made_for: MadeFor) -> None:
        self._made_for = made_for
        self._warned: set[str] = set()

    @property
    def _serving_module(self) -> torch.nn.Module | None:
        """The eager module where that, and nothing else, answers calls; otherwise None."""
        return None

    def _module_to_change(self) -> torch.nn.Module | None:
        """The module that takes a change: the one that serves, or one that serves from now on; None to refuse it."""
        return self._serving_module

    def _eager_module(self) -> torch.nn.Module:
        return self._made_for.eager()

    def _module_at_hand(self) -> torch.nn.Module | None:
        made_for = self.__dict__.get("_made_for")
        built: Any = getattr(getattr(made_for, "source", None), "built", None)
        return None if built is None else built()

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Does nothing for a device, which was settled when the model was loaded; a dtype is a change as of `half`."""
        given = [value for value in (*args, *kwargs.values()) if isinstance(value, (torch.dtype, torch.Tensor))]
        dtype = next((value.dtype if isinstance(value, torch.Tensor) else value for value in given), None)
        return self if dtype is None else self._cast(dtype)

    def half(self) -> Self:
        """Cast an eager model that serves to float16; one that is compiled must have been compiled for it."""
        return self._cast(torch.float16)

    def bfloat16(self) -> Self:
        """As `half`, to bfloat16."""
        return self._cast(torch.bfloat16)

    def float(self) -> Self:
        """As `half`, to float32."""
        return self._cast(torch.float32)

    def double(self) -> Self:
        """As `half`, to float64."""
        return self._cast(torch.float64)

    def _cast(self, dtype: torch.dtype) -> Self:
        serving = self._serving_module
        if serving is None and self._dtypes() == {dtype}:
            return self
        module = self._module_to_change()
        if module is None:
            raise _frozen_error(f"the cast to {str(dtype)[6:]}", self._made_for.source.name)
        module.to(dtype=dtype)
        return self

    def _dtypes(self) -> set[torch.dtype]:
        """The dtypes in which a compiled model was compiled."""
        wanted = self._made_for.settings.dtype
        if wanted is not None:
            return {getattr(torch, wanted)}
        return {tensor.dtype for tensor in self._made_for.source.weights().values() if tensor.is_floating_point()}

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        """What `to`, `half` and their like of a module around this one call; the same rules hold."""
        module = self._serving_module
        if module is not None:
            module._apply(fn, recurse)  # type: ignore[no-untyped-call]
            return self
        for dtype in self._dtypes():
            given = fn(torch.empty(0, dtype=dtype)).dtype
            if given != dtype:
                module = self._module_to_change()
                if module is None:
                    raise _frozen_error(f"the cast to {str(given)[6:]}", self._made_for.source.name)
                module._apply(fn, recurse)  # type: ignore[no-untyped-call]
                return self
        return self

    def eval(self) -> Self:
        """Does nothing: a model is loaded in eval mode."""
        return self

    def train(self, mode: bool = True) -> Self:
        """Put an eager model that serves into training mode; a compiled one has been built in eval mode."""
        module = self._module_to_change() if mode else self._serving_module
        if module is not None:
            module.train(mode)
        elif mode:
            raise _frozen_error("train()", self._made_for.source.name)
        return self

    def cpu(self) -> Self:
        """Does nothing: the device was settled when the model was loaded."""
        return self

    def cuda(self, device: Any = None) -> Self:
        """Does nothing: the device was settled when the model was loaded."""
        return self

    def __getattr__(self, name: str) -> Any:
        if name in _OWN or "_made_for" not in self.__dict__:  # `__init__` has not run
            raise AttributeError(name)
        module = self._serving_module
        if module is None and name in _CHANGES:
            return functools.partial(self._change, name)
        value = super().__getattr__(name)
        if module is None and isinstance(value, (torch.nn.Module, torch.Tensor)):
            self._warn_of_change(name)
        return value

    def _change(self, name: str, *args: Any, **kwargs: Any) -> Any:
        module = self._module_to_change()
        if module is None:
            raise _frozen_error(f"{name}()", self._made_for.source.name)
        return getattr(module, name)(*args, **kwargs)

    def __setattr__(self, name: str, value: Any) -> None:
        changes = isinstance(value, (torch.nn.Module, torch.Tensor))
        if not changes and (name.startswith("_") or name in _OWN):
            return super().__setattr__(name, value)
        module = self._serving_module
        if module is None and (changes or hasattr(self._made_for.eager(), name)):
            module = self._module_to_change()
            changes = True
        if module is not None:
            return setattr(module, name, value)
        if changes:
            raise _frozen_error(f"the assignment of {name}", self._made_for.source.name)
        return super().__setattr__(name, value)  # a note of the handler's own

    def __delattr__(self, name: str) -> None:
        if name in self.__dict__:
            return super().__delattr__(name)
        module = self._module_to_change()
        if module is None:
            raise _frozen_error(f"the deletion of {name}", self._made_for.source.name)
        return delattr(module, name)

    def _warn_of_change(self, name: str) -> None:
        if name not in self._warned:
            self._warned.add(name)
            logger.warning(
                "%s: %s is that of the eager module, which does not serve; changes of it have no effect on answers",
                *(self._made_for.source.name, name),
            )


_OWN = frozenset({"outcome", "metrics", "background", "answering", "store", "_serving_module"})
_CHANGES = frozenset(
    {
        "_load_from_state_dict",
        "add_module",
        "apply",
        "compile",
        "load_state_dict",
        "register_backward_hook",
        "register_buffer",
        "register_forward_hook",
        "register_forward_pre_hook",
        "register_full_backward_hook",
        "register_full_backward_pre_hook",
        "register_load_state_dict_post_hook",
        "register_module",
        "register_parameter",
        "set_extra_state",
        "set_submodule",
        "to_empty",
        "type",
    }
)
"""Methods of `torch.nn.Module` that change a module, beside those that `ServedModel` has itself."""


def source_of(model: GuardedModel) -> ModelSource:
    """Where a model comes from."""
    return model._made_for.source


def _frozen_error(what: str, name: str) -> FrozenModelError:
    return FrozenModelError(
        f"{what} of {name}, a compiled model, has no effect on what serves; change the model in load_model of the "
        "handler, set dtype: in handler.ts_handlers, or serve the module itself with backends: [eager]"
    )

"""A compiled method in the place of a module's own: the module stays what it is, and calls of it reach the artifact."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch

from ts_handlers.backends import get_backend
from ts_handlers.compiled_model import ServedModel, count_other_form
from ts_handlers.model.explanations import explanations_under_way
from ts_handlers.model.methods import Called, CallForm, Weights

logger = logging.getLogger(__name__)


class ServedMethod:
    """Answers the calls of a module's method.

    A call with the declared inputs, and otherwise with the fixed arguments and the method's defaults, is answered by
    the artifact. Every other call is answered by the method of the module's class: with other arguments, with inputs
    that need gradients, in training mode, while answers are explained, and for good once a tensor of the module has
    been changed that the artifact has a copy of.

    Attributes
    ----------
    model:
        The compiled method.
    reason:
        Why the method of the class answers every call, or None.
    measured:
        Gives a context for each call while something measures them, or None.
    """

    def __init__(self, name: str, model: ServedModel, called: Called, form: CallForm) -> None:
        self._name = name
        self.model = model
        self.reason: str | None = None
        self.measured: Callable[[], AbstractContextManager[None]] | None = None
        self._called = called
        self._form = form
        self._weights = Weights(called.inner)
        self.__signature__ = form.signature  # what `inspect.signature` says of the module's method
        self.__name__ = called.method
        self.__doc__ = called.call.__doc__

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.measured is None:
            return self._answer(args, kwargs)
        with self.measured():
            return self._answer(args, kwargs)

    def _answer(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.reason is not None or explanations_under_way() or self._called.inner.training:
            return self._called.call(*args, **kwargs)
        inputs = self._form.inputs(args, kwargs)
        if isinstance(inputs, str):
            count_other_form(self.model, inputs)
        elif inputs is not None and not _needs_gradients(inputs) and not self._is_stale():
            return self._form.answer(self.model(**inputs), kwargs)
        return self._called.call(*args, **kwargs)

    def _is_stale(self) -> bool:
        """Whether the artifact has copies of tensors that have been changed; says so, and gives the artifact up."""
        if get_backend(self.model.outcome.backend).needs_eager_module or not self._weights.have_changed():
            return False
        self.reason = "the module has been changed after its start, so it answers itself"
        logger.warning("%s: %s", self._name, self.reason)
        return True

    def install(self) -> None:
        """Take the method's place in the module."""
        inner = self._called.inner
        object.__setattr__(inner, self._called.method, self)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """A copy of the module has the method of its class again."""
        inner = self._called.inner
        return functools.partial(_call, memo.get(id(inner), inner), self._called.method)

    def __reduce__(self) -> Any:
        return functools.partial, (_call, self._called.inner, self._called.method)


def _call(module: torch.nn.Module, method: str, *args: Any, **kwargs: Any) -> Any:
    """Call the method of a module's class."""
    return getattr(type(module), method)(module, *args, **kwargs)


def _needs_gradients(inputs: dict[str, Any]) -> bool:
    return torch.is_grad_enabled() and any(
        isinstance(value, torch.Tensor) and value.requires_grad for value in inputs.values()
    )

"""What the mixin asks of a handler that knows nothing of this package: what it holds, and whether that can be compiled.

Handlers build their model in `initialize` with or without `BaseHandler`, or hold none. The mixin swaps the module and
leaves the methods alone, so whatever is no module is served as TorchServe would serve it.
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable, Iterable
from typing import Any

import torch

from ts_handlers.compiled_model import ServedModel
from ts_handlers.errors import InputError, SettingsError
from ts_handlers.model.explanations import explanations
from ts_handlers.servers.torchserve.base_handler import BaseHandler
from ts_handlers.servers.torchserve.request_batch import RequestBatch
from ts_handlers.settings import SECTION

logger = logging.getLogger(__name__)

EXPLAIN = ("explain_handle", "get_insights")
"""Methods of a handler that explain answers; `get_insights` is captum's in TorchServe's own handlers."""


def is_base_handlers(bound: Any, name: str) -> bool:
    """Whether a bound method is the one that `BaseHandler` has under this name."""
    return getattr(bound, "__func__", None) is getattr(BaseHandler, name)


def unwrapped(model: Any) -> Any:
    """The module inside one of `torch.compile`, which compiles again in each process; others as they are."""
    if isinstance(model, ServedModel) or not isinstance(model, torch.nn.Module):
        return model
    return getattr(model, "_orig_mod", model)


def set_compile_aside(module: torch.nn.Module) -> Callable[[], None]:
    """Undo a handler's ``module.compile()``, which would compile again in each process; returns what does it again."""
    theirs = vars(module).pop("_compiled_call_impl", None)

    def restore() -> None:
        if theirs is not None:
            vars(module)["_compiled_call_impl"] = theirs

    return restore


def reason_not_to_compile(model: Any, name: str = "self.model") -> str | None:
    """Why what a handler holds is served as it is; None when it can be compiled.

    Parameters
    ----------
    model:
        What it holds, without the wrapper of `torch.compile`; None when there is none.
    name:
        Where it holds that, for the reason.
    """
    if model is None:
        return f"the handler has no {name} after initialize"
    if isinstance(model, torch.jit.ScriptModule):
        return f"{name} is a TorchScript model"
    if not isinstance(model, torch.nn.Module):
        return f"{name} is a {type(model).__name__} and no torch.nn.Module"
    devices = sorted({str(tensor.device) for tensor in _tensors(model)})
    if len(devices) > 1 or "meta" in devices:
        return f"the tensors of {name} lie on {', '.join(devices)}; expected one device"
    return None


def device_of(module: torch.nn.Module) -> torch.device | None:
    """The device of a module's tensors, None when it has none."""
    return next((tensor.device for tensor in _tensors(module)), None)


def _tensors(module: torch.nn.Module) -> Iterable[torch.Tensor]:
    yield from module.parameters()
    yield from module.buffers()


def refusing(preprocess: Any) -> Any:
    """Make every ValueError of a preprocess (broken JSON, bad text, a wrong shape) a refusal of the request."""

    @functools.wraps(preprocess)
    def wrapped(self: Any, data: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return preprocess(self, data, *args, **kwargs)
        except InputError:
            raise
        except ValueError as error:
            raise InputError(f"the request cannot be read: {error}") from error

    return wrapped


def explaining(method: Callable[..., Any]) -> Callable[..., Any]:
    """A method of a handler during which the models that it calls are eager ones, with gradients and hooks."""

    @functools.wraps(method)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        with explanations():
            return method(self, *args, **kwargs)

    wrapped.explains = True  # type: ignore[attr-defined]
    return wrapped


def wrap_explanations(kind: type) -> None:
    """Make the methods that explain answers, a class's own or inherited, `explaining` ones."""
    for name in EXPLAIN:
        method = inspect.getattr_static(kind, name, None)
        if inspect.isfunction(method) and not hasattr(method, "explains"):
            setattr(kind, name, explaining(method))


def finishing(initialize: Callable[..., Any]) -> Callable[..., Any]:
    """An `initialize` after whose outermost call the mixin finishes its own: by then a class above it has set up what
    samples need, such as a tokenizer."""

    @functools.wraps(initialize)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        self._initializing += 1
        try:
            result = initialize(self, *args, **kwargs)
        finally:
            self._initializing -= 1
        if not self._initializing:
            self._after_initialize()
        return result

    return wrapped


def inputs_needed(make_module: Callable[[], torch.nn.Module]) -> SettingsError:
    """What the default preprocess raises where nobody has declared the inputs; `make_module` returns the module."""
    from ts_handlers.model.proposal import proposal_text

    return SettingsError(f"{SECTION}.inputs: needed by the default preprocess{proposal_text(make_module)}")


def wrap_methods(kind: type) -> None:
    """Wrap what a class itself defines: `preprocess` in `refusing`, `initialize` in `finishing`; and explanations."""
    for name, wrap in (("preprocess", refusing), ("initialize", finishing)):
        if name in kind.__dict__:
            setattr(kind, name, wrap(kind.__dict__[name]))
    wrap_explanations(kind)


def answers_describe(below: Any, batch: RequestBatch) -> bool:
    """Whether a request is TorchServe's describe, and a handler's own `handle` would take it for a prediction.

    Parameters
    ----------
    below:
        The bound method `handle` of the class behind the mixin.
    batch:
        The request.
    """
    if is_base_handlers(below, "handle") or inspect.iscoroutinefunction(below):
        return False
    return batch.is_describe()


def describe_uncompiled(handler: Any, reason: str | None) -> dict[str, Any]:
    """What describe shows of a handler whose model is served as it is."""
    script = isinstance(getattr(handler, "model", None), torch.jit.ScriptModule)
    return {"backend": "torchscript" if script else "other", "reason": reason}


def with_their_description(facts: dict[str, Any], below: Any) -> dict[str, Any]:
    """What describe shows: ours, with what the handler's own `describe_handle` says.

    Parameters
    ----------
    facts:
        Ours.
    below:
        The bound method `describe_handle` of the class behind the mixin, or None.
    """
    if below is None or is_base_handlers(below, "describe_handle"):
        return facts
    theirs = below()
    if isinstance(theirs, dict):
        return {**facts, **theirs}
    return facts if theirs is None else {**facts, "handler": theirs}

"""What the mixin asks of a handler that knows nothing of this package: what it holds, and whether that can be compiled.

Handlers build their model in `initialize` with or without `BaseHandler`, or hold none. The mixin swaps the module and
leaves the methods alone, so whatever is no module is served as TorchServe would serve it.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from ts_handlers.compiled_model import CompiledModel, ServedModel
from ts_handlers.errors import ForeignBackendError, InputError, SettingsError, one_line
from ts_handlers.model.explanations import explanations
from ts_handlers.servers.torchserve.base_handler import BaseHandler
from ts_handlers.servers.torchserve.request_batch import RequestBatch
from ts_handlers.settings import SECTION, Settings, parse_settings

logger = logging.getLogger(__name__)

EXPLAIN = ("explain_handle", "get_insights")
"""Methods of a handler that explain answers; `get_insights` is captum's in TorchServe's own handlers."""
HELPERS = ("batch_state", "model_device", "request_body")
"""What the mixin offers to handlers that are written for it; nothing of its own goes through these names."""


def is_base_handlers(bound: Any, name: str) -> bool:
    """Whether a bound method is the one that `BaseHandler` has under this name."""
    return getattr(bound, "__func__", None) is getattr(BaseHandler, name)


def unwrapped(model: Any) -> Any:
    """The module inside one of `torch.compile`, which compiles again in each process; others as they are."""
    if isinstance(model, ServedModel) or not isinstance(model, torch.nn.Module):
        return model
    return getattr(model, "_orig_mod", model)


def read_settings(config: Mapping[str, Any]) -> tuple[Settings, str | None]:
    """The settings, and why nothing is compiled where ``pt2`` names a compiler that only plain TorchServe knows.

    Such a model is loaded and compiled by `BaseHandler`, in each process, as without this package.

    Raises
    ------
    SettingsError
        Also for a compiler that TorchServe does not know, and with ``strict: true`` or ``on_miss: fail``.
    """
    try:
        return parse_settings(config), None
    except ForeignBackendError as error:
        from ts.utils.util import PT2Backend

        settings = parse_settings({name: value for name, value in config.items() if name != "pt2"})
        known = error.backend in {backend.value for backend in PT2Backend}
        if not known or settings.strict or settings.on_miss == "fail":
            raise
        return settings, one_line(error)


def options_when_called(config: Mapping[str, Any], settings: Settings) -> dict[str, Any] | None:
    """The options of `torch.compile` where ``pt2`` asks for Inductor and no inputs are declared; None otherwise.

    Nothing can be built ahead then. Plain TorchServe would compile at the first request of each process.
    """
    pt2 = config.get("pt2")
    asked = isinstance(pt2, str) or (
        isinstance(pt2, Mapping) and bool(pt2) and ("compile" in pt2 or "export" not in pt2)
    )
    chosen = settings.compile
    if not asked or settings.inputs or not chosen.enable or chosen.backend != "inductor" or settings.strict:
        return None
    options: dict[str, Any] = {"backend": chosen.backend, "mode": chosen.mode, "options": chosen.options or None}
    options.update(dynamic=chosen.dynamic, fullgraph=chosen.fullgraph or None)
    return {name: value for name, value in options.items() if value is not None}


def compile_as_plain(model: ServedModel, config: Mapping[str, Any], settings: Settings) -> ServedModel:
    """The model, which `torch.compile` compiles at its first request where `options_when_called` says so."""
    options = options_when_called(config, settings)
    if options is None or model.outcome.backend != "eager" or not isinstance(model, CompiledModel):
        return model
    model.compile_when_called(options)
    note = "no inputs are declared: torch.compile compiles at the first request of each process, as pt2 asks"
    model.outcome = dataclasses.replace(model.outcome, notes=(*model.outcome.notes, note))
    shown = ", ".join(f"{name} {value}" for name, value in options.items())
    logger.info("%s. Compiled model with %s", note, shown)
    return model


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
    training = sorted({type(child).__name__ for child in model.modules() if _answers_otherwise_in_training(child)})
    if training:
        return (
            f"{name} is in training mode, in which {', '.join(training)} answer otherwise; call "
            f"{name}.eval() in initialize"
        )
    return None


def _answers_otherwise_in_training(layer: torch.nn.Module) -> bool:
    """Whether a layer is in training mode, and would give other numbers in eval mode."""
    if not layer.training:
        return False
    if isinstance(layer, (torch.nn.modules.batchnorm._NormBase, torch.nn.RReLU)):
        per_instance = isinstance(layer, torch.nn.modules.instancenorm._InstanceNorm)
        return not per_instance or bool(layer.track_running_stats)
    if isinstance(layer, torch.nn.modules.dropout._DropoutNd):
        return layer.p > 0
    return isinstance(layer, (torch.nn.RNNBase, torch.nn.MultiheadAttention)) and layer.dropout > 0


def device_of_model(handler: Any) -> torch.device:
    """Where a handler's model runs: on the worker's GPU, else where the handler puts its tensors."""
    return handler._gpu or torch.device(getattr(handler, "device", None) or "cpu")


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


def adapt(kind: type, mixin: type) -> None:
    """Fit a class with the mixin to the handler class behind it."""
    wrap_methods(kind)
    give_way(kind, mixin)


def give_way(kind: type, mixin: type) -> None:
    """Let the class behind the mixin keep what it calls as the mixin calls its helpers for handlers of our own."""
    behind = kind.__mro__[kind.__mro__.index(mixin) + 1 :]
    for name in HELPERS:
        theirs = next((vars(each)[name] for each in behind if name in vars(each)), None)
        if theirs is not None and inspect.getattr_static(kind, name) is inspect.getattr_static(mixin, name):
            setattr(kind, name, theirs)


def answer_of_describe(below: Any, batch: RequestBatch, describe: Callable[[], dict[str, Any]]) -> Any:
    """The answer to TorchServe's describe where a handler's own `handle` would take it for a prediction, else None.

    Parameters
    ----------
    below:
        The bound method `handle` of the class behind the mixin; the answer is awaitable as its answers are.
    batch:
        The request.
    describe:
        The handler's `describe_handle`.
    """
    if is_base_handlers(below, "handle") or not batch.is_describe():
        return None
    return _awaitable([describe()]) if inspect.iscoroutinefunction(below) else [describe()]


async def _awaitable(answers: Any) -> Any:
    return answers


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

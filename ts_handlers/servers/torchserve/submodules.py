"""Modules below a handler that are compiled by themselves: the setting ``models``.

After the handler's `initialize` each path leads to a module. The method that the setting names is replaced in that
very module by a `ServedMethod`: pipelines, `generate` and whoever else holds the module call the artifact, and
everything else about the module is as before. What cannot be compiled stays as it is, with the reason in the log and
in `describe`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec
import torch

from ts_handlers.compiled_model import ServedModel
from ts_handlers.errors import BuildError, MissError, SettingsError, one_line
from ts_handlers.model.methods import Called, CallForm, MethodModule, MethodSource, reason_against_method
from ts_handlers.model.recipes import Made
from ts_handlers.servers.served_method import ServedMethod
from ts_handlers.servers.torchserve.metrics import Emitter
from ts_handlers.servers.torchserve.ready import begin_serving
from ts_handlers.servers.torchserve.shares import Shares
from ts_handlers.servers.torchserve.their_handler import device_of, reason_not_to_compile, set_compile_aside, unwrapped
from ts_handlers.settings import SECTION, Settings
from ts_handlers.settings.model import GenerateSettings, SubmodelSettings
from ts_handlers.settings.submodels import settings_of
from ts_handlers.start import hand_over, start_model

logger = logging.getLogger(__name__)


@dataclasses.dataclass
class Submodel:
    """One module of the setting ``models``.

    Attributes
    ----------
    name:
        As in the settings.
    module:
        What the path leads to.
    made:
        What is started: its name is the handler's with the submodel's.
    reason:
        Why the module answers itself; None when it is compiled.
    model, served:
        The compiled method, and what has taken the method's place.
    restore:
        Gives the module back what was set aside to compile it.
    """

    name: str
    path: str
    method: str
    module: torch.nn.Module
    made: Made | None = None
    called: Called | None = None
    form: CallForm | None = None
    reason: str | None = None
    model: ServedModel | None = None
    served: ServedMethod | None = None
    restore: Callable[[], None] = lambda: None


def start_submodels(
    handler: Any, context: Any, settings: Settings, recipe: Mapping[str, Any] | None, shares: Shares
) -> Submodels:
    """Compile the modules that the settings name, each in its place.

    The arguments are a `CompiledHandlerMixin` that is initialized, TorchServe's context, and what `Submodels` takes.
    """
    folder = context.system_properties.get("model_dir")
    submodels = Submodels(handler, settings, context.model_name, handler.model_device, recipe, folder, shares)
    config, torchserve_metrics = handler.model_yaml_config, getattr(context, "metrics", None)
    submodels.emitters = begin_serving(submodels.models, config, torchserve_metrics)
    return submodels


class Submodels:
    """All submodels of a handler.

    Parameters
    ----------
    handler:
        The handler, initialized.
    settings:
        Its settings.
    name:
        The model's name in TorchServe.
    device:
        Where modules without tensors run.
    recipe, folder:
        How another process makes the handler, and where its archive lies; None where that is not known.
    shares:
        Measures where the time of the first batches goes.

    Raises
    ------
    SettingsError
        A path leads to no module, or inputs do not fit the method.
    MissError
        `on_miss: fail` and there is no entry.
    WarmStartError
        `strict: true` and a module cannot be compiled.
    """

    def __init__(
        self,
        handler: Any,
        settings: Settings,
        name: str,
        device: torch.device,
        recipe: Mapping[str, Any] | None,
        folder: str | Path | None,
        shares: Shares,
    ) -> None:
        self._settings = settings
        self._shares = shares
        self._device = device
        self._recipe = recipe
        self._folder = folder
        self.all = [self._find(handler, each) for each in settings.models]
        self._refuse_nested()
        for each in self.all:
            self._make(each, f"{name}.{each.name}")
        hand_over([each.made for each in self.all if each.made is not None])
        for each in self.all:
            self._start(each)
        for each in self.all:
            self._install(each)
        compiled = {id(child) for each in self.all if each.served is not None for child in each.module.modules()}
        self._shares.measure_modules(handler, compiled)
        self.emitters: list[Emitter] = []

    @property
    def models(self) -> list[ServedModel]:
        """Those that were started."""
        return [each.model for each in self.all if each.model is not None]

    def _find(self, handler: Any, name: str) -> Submodel:
        asked = self._settings.models[name]
        module = find_module(handler, asked.path, f"{SECTION}.models.{name}.path")
        return Submodel(name, asked.path, asked.method, module)

    def _refuse_nested(self) -> None:
        for position, each in enumerate(self.all):
            for other in self.all[:position]:
                if other.module is each.module and other.method == each.method:
                    raise SettingsError(
                        f"{SECTION}.models.{each.name}.path: {each.path} is the same module as {other.path}; name its "
                        f"method {each.method} once"
                    )
            inside = {id(child) for child in each.module.modules()} - {id(each.module)}
            for other in self.all:
                if id(other.module) in inside:
                    raise SettingsError(
                        f"{SECTION}.models.{other.name}.path: {other.path} lies inside {each.path}, which "
                        f"{each.name} compiles as a whole; remove one of them"
                    )

    def _make(self, each: Submodel, full_name: str) -> None:
        """Find out what is to be started for a submodel, or why nothing is."""
        asked = self._settings.models[each.name]
        where = f"{SECTION}.models.{each.name}"
        each.reason = reason_not_to_compile(each.module, each.path) or reason_against_method(each.module, each.method)
        settings, device = settings_of(self._settings, each.name), device_of(each.module) or self._device
        if each.reason is None and asked.generate is not None:
            settings = self._make_decode_steps(each, asked.generate, settings, device)
        elif each.reason is None and asked.inputs:
            _make_method(where, each, asked)
        elif each.reason is None:
            each.reason = _without_inputs(where, each)
        if each.called is None:
            if self._settings.strict:
                raise SettingsError(f"{where}: {each.reason}")
            return
        each.restore = set_compile_aside(each.module)
        recipe = None if self._recipe is None else {**self._recipe, "part": full_name}
        source = MethodSource(full_name, each.called, recipe=recipe, folder=self._folder)
        each.made = Made(source, settings, device)

    def _make_decode_steps(
        self, each: Submodel, asked: GenerateSettings, settings: Settings, device: torch.device
    ) -> Settings:
        """Find out how the model generates; returns its settings with the inputs of a step."""
        from ts_handlers.model.decode_steps import DecodeForm, DecodeModule, record_decode_call

        try:
            call = record_decode_call(each.module, asked)
        except BuildError as error:
            each.reason = str(error)
            return settings
        inputs, dimensions = call.inputs(asked, device.type != "cpu")
        each.form = DecodeForm(each.module, call, asked)
        each.called = DecodeModule(each.module, call, [spec.name for spec in inputs])
        return msgspec.structs.replace(settings, inputs=tuple(inputs), dimensions=dimensions)

    def _start(self, each: Submodel) -> None:
        if each.made is not None:
            assert each.made.settings is not None
            assert each.made.device is not None
            try:
                each.model = start_model(each.made.source, each.made.settings, each.made.device)
            except (SettingsError, MissError):
                raise
            except Exception as error:
                if self._settings.strict:
                    raise
                logger.debug("details", exc_info=error)
                each.reason = f"{type(error).__name__}: {one_line(error)}"
        if each.reason is not None:
            logger.warning("%s: %s is not compiled and serves as it is: %s", each.name, each.path, each.reason)

    def _install(self, each: Submodel) -> None:
        model = each.model
        if model is None or (model.outcome.backend == "eager" and model.background is None):
            each.restore()
            return
        assert each.called is not None
        assert each.form is not None
        each.served = ServedMethod(each.name, model, each.called, each.form)
        each.served.install()
        each.form.prepare()
        self._shares.measure_model(each.name, model, functools.partial(setattr, each.served, "measured"))

    @contextlib.contextmanager
    def batch(self, context: Any) -> Iterator[None]:
        """What surrounds the answering of a batch: it is counted and reported."""
        models = self.models
        for model in models:
            model.answering += 1
        try:
            yield
        finally:
            for model in models:
                model.answering -= 1
            self.report(getattr(context, "metrics", None))

    def report(self, torchserve_metrics: Any) -> None:
        """Hand counters and phases of all models to TorchServe's metrics."""
        for emitter, model in zip(self.emitters, self.models, strict=True):
            emitter.emit(torchserve_metrics)
            emitter.emit_contexts(torchserve_metrics, model.context_stats())

    def describe(self) -> dict[str, Any]:
        """A row for each submodel."""
        return {"models": {each.name: _row(each) for each in self.all}}


def _make_method(where: str, each: Submodel, asked: SubmodelSettings) -> None:
    names = [spec.name for spec in asked.inputs]
    each.form = CallForm(getattr(each.module, each.method), names, asked.arguments)
    problem = each.form.reason_against()
    if problem is not None:
        raise SettingsError(f"{where}: inputs and arguments do not fit {each.path}.{each.method}: {problem}")
    each.called = MethodModule(each.module, each.method, names, asked.arguments)


def _row(each: Submodel) -> dict[str, Any]:
    facts = {"path": each.path, "method": each.method}
    if each.model is None:
        return {**facts, "backend": "eager", "reason": each.reason}
    reason = None if each.served is None else each.served.reason
    return {**facts, **each.model.describe(), "reason": reason}


def _without_inputs(where: str, each: Submodel) -> str:
    from ts_handlers.model.proposal import declare_as

    ending = declare_as(each.module) if each.method == "forward" else None
    return f"{where}.inputs: a compiling backend needs the inputs of {each.method}, found none" + (
        ending or "; declare them"
    )


def find_module(handler: Any, path: str, where: str) -> torch.nn.Module:
    """The module to which a path leads: attributes, keys or indices from the handler on.

    Parameters
    ----------
    where:
        The setting that holds the path, for messages.

    Raises
    ------
    SettingsError
        There is none; with the modules that lie where the path ends.
    """
    parent: Any = None
    value: Any = handler
    for step, name in enumerate(path.split(".")):
        parent, before = value, ".".join(["the handler", *path.split(".")[:step]])
        try:
            value = _below(value, name)
        except (AttributeError, LookupError, TypeError, ValueError):
            near = _modules_at(parent)
            raise SettingsError(
                f"{where}: {path!r}: {before} has no {name!r} after initialize; "
                + (f"modules there are {', '.join(near)}" if near else "there are no modules there")
            ) from None
    module: torch.nn.Module = unwrapped(value)
    if isinstance(value, ServedModel) or not isinstance(module, torch.nn.Module):
        raise SettingsError(f"{where}: {path!r} is a {type(value).__name__}; expected a torch.nn.Module")
    if module is not value:  # what torch.compile has wrapped would compile again in each process
        _put(parent, path.rpartition(".")[2], module)
    return module


def _below(value: Any, name: str) -> Any:
    if isinstance(value, Mapping):
        return value[name]
    if isinstance(value, (list, tuple)):
        return value[int(name)]
    return getattr(value, name)


def _put(parent: Any, name: str, module: torch.nn.Module) -> None:
    if isinstance(parent, dict):
        parent[name] = module
    elif isinstance(parent, list):
        parent[int(name)] = module
    elif not isinstance(parent, tuple):
        setattr(parent, name, module)


_MOST_NAMED = 10


def _modules_at(value: Any) -> list[str]:
    items: Any = (
        value.items() if isinstance(value, Mapping) else vars(value).items() if hasattr(value, "__dict__") else ()
    )
    if isinstance(value, torch.nn.Module):
        items = value.named_children()
    return [str(name) for name, item in items if isinstance(item, torch.nn.Module)][:_MOST_NAMED]

"""TorchServe handlers: `CompiledHandler` for tensors as JSON, and a mixin that turns any handler class into one.

The mixin swaps the handler's module and leaves its methods alone. `ts_handlers.servers.torchserve.archive` has the
rules for the archive, `ts_handlers.servers.torchserve.their_handler` those for the handler.
"""

from __future__ import annotations

import gc
import inspect
import logging
import os
import time
import types
from typing import Any

import torch

# What torch has made by now stays. Otherwise the next imports make Python's cycle collector walk all of it once more,
# see docs/decisions/0020-warm-torch-compile.md.
gc.freeze()

from ts_handlers.compiled_model import ServedModel
from ts_handlers.errors import InputError, MissError, SettingsError, one_line
from ts_handlers.model.base import ModelSource
from ts_handlers.model.module import ModuleSource
from ts_handlers.monitoring.progress import of_background
from ts_handlers.servers.torchserve.answering import Below, answer, answer_one_by_one, answer_together
from ts_handlers.servers.torchserve.archive import (
    EXPORTED,
    ArchiveFiles,
    gpu_of_worker,
    name_of_model,
    own_build,
    prepared_for_base_handler,
    refusing_weights_alone,
    source_of_archive,
)
from ts_handlers.servers.torchserve.envelopes import guard_envelope
from ts_handlers.servers.torchserve.metrics import Emitter, RequestMeter, begin_to_record
from ts_handlers.servers.torchserve.micro_batching import MicroBatches, micro_batches_of
from ts_handlers.servers.torchserve.ready import begin_serving
from ts_handlers.servers.torchserve.recipes import handler_recipe
from ts_handlers.servers.torchserve.request_batch import CurrentBatch, RequestBatch
from ts_handlers.servers.torchserve.shares import Shares
from ts_handlers.servers.torchserve.their_handler import (
    adapt,
    answer_of_describe,
    compile_as_plain,
    describe_uncompiled,
    device_of,
    device_of_model,
    is_base_handlers,
    read_settings,
    reason_not_to_compile,
    set_compile_aside,
    unwrapped,
    with_their_description,
    wrap_methods,
)
from ts_handlers.settings import SECTION, Settings
from ts_handlers.start import start_model

logger = logging.getLogger(__name__)


class CompiledHandlerMixin:
    """Serves the model from the artifact store. Put it before the handler class it turns into a compiled one::

        class Handler(CompiledHandlerMixin, TheirHandler):
            pass

    The methods of that class run as before. What is swapped is ``self.model``, a `torch.nn.Module`, for a `ServedModel`
    that looks like it. Only `BaseHandler`'s own `inference` is replaced, by one that also takes dicts, lists and
    tuples. A handler that holds nothing to compile is served as it is, with the reason in the log and in `describe`.

    `preprocess`, `inference`, `postprocess`, `initialize` and `handle` can be overridden as before. `load_model` can be
    overridden to build the eager model in another way than from the archive's model file.

    With TorchServe's section ``micro_batching`` in model-config.yaml, parts of a batch pass `preprocess`, `inference`
    and `postprocess` in threads of their own. What belongs to a batch must then stand in `batch_state` and not on
    `self`.
    """

    model: Any
    settings: Settings
    _current: CurrentBatch
    _shares: Shares
    _micro_batches: MicroBatches | None = None
    _last_context: Any = None
    _gpu: torch.device | None = None
    _emitter: Emitter
    request_meter: RequestMeter
    _not_compiled: str | None = None
    _submodels: Any = None
    _sampled: Any = None
    _results: Any = None
    _initializing = 0

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """Works for handlers that do not call their base class's constructor."""
        made = super().__new__(cls)
        made._current = CurrentBatch()
        made._shares = Shares()
        made.request_meter = RequestMeter()
        return made

    @property
    def context(self) -> Any:
        """TorchServe's context of the requests that this thread works on; the first of them has index 0."""
        batch = self._current.batch
        return self._last_context if batch is None else batch.context

    @context.setter
    def context(self, value: Any) -> None:
        if self._current.batch is None:
            self._last_context = value
        else:
            self._current.batch.context = value

    @property
    def batch_state(self) -> types.SimpleNamespace:
        """A place for values that go from `preprocess` to `postprocess`: each batch, or part of one, has its own."""
        return self._current.state

    def initialize(self, context: Any) -> None:
        """Make the model ready: from the store, or by building and publishing it.

        Raises
        ------
        SettingsError, ModelError
            With what was expected, what was found and what to do; TorchServe logs it and serves its other models.
        """
        config = getattr(context, "model_yaml_config", None) or {}
        self.__settings, self._not_compiled = self._read_settings(config)
        self.settings = self.__settings  # a handler may set attributes of such names
        self.__context = context
        self.__config = config
        self.__name = name_of_model(context)
        self.request_meter.name = self.__name
        begin_to_record(self.__settings, self.__name)
        self.__recipe = handler_recipe(type(self), context, config)
        self._gpu = gpu_of_worker(context)
        across_workers = self.__settings.contexts.across_workers
        if self._gpu is not None and not across_workers:
            torch.cuda.set_device(self._gpu)
        left = self._not_compiled is not None
        prepared = prepared_for_base_handler(context, config, hide_gpu=across_workers, compiles=left)
        with refusing_weights_alone(context.manifest["model"]), prepared:
            super().initialize(context)  # type: ignore[misc]
        self.model_yaml_config = config
        guard_envelope()
        if self.__settings.models:
            from ts_handlers.servers.torchserve.submodules import start_submodels

            self._submodels = start_submodels(self, context, self.__settings, self.__recipe, self._shares)
        else:
            self._start_module_of_base_handler()
        if "handle" not in vars(self) and is_base_handlers(getattr(super(), "handle", None), "handle"):
            self._micro_batches = micro_batches_of(self, self._current, config, self.__settings.contexts)

    def _after_initialize(self) -> None:
        """Called when the outermost `initialize` of the handler has ended."""
        if self._sampled is not None:
            self.model = self._sampled.finish(self.model, self._answer_below)
            if self._served is not None:
                self.model = self._as_plain(self._served)
        if not self.__settings.models:
            self._shares.measure_served(self, self._served)
        self.request_meter.begin(self._served)
        if self.__settings.result_cache is not None:
            from ts_handlers.servers.torchserve.result_cache import results_of

            ours = getattr(self.handle, "__func__", None) is CompiledHandlerMixin.handle
            below: Any = super().handle if ours else None  # type: ignore[misc]
            given = self._served, self.__settings, self.__config, self.__context
            self._results = results_of(self, below, *given)
        if self._served is not None:
            (self._emitter,) = begin_serving([self._served], self.__config, getattr(self.__context, "metrics", None))

    @property
    def _served(self) -> ServedModel | None:
        """`self.model` if it is swapped."""
        model = getattr(self, "model", None)
        return model if isinstance(model, ServedModel) else None

    _read_settings = staticmethod(read_settings)

    def _start_module_of_base_handler(self) -> None:
        """Start the model from the module that a handler below has built in a way of its own, if it has."""
        model = unwrapped(getattr(self, "model", None))
        if isinstance(model, ServedModel):
            self.model = model
            return
        self._not_compiled = self._not_compiled or reason_not_to_compile(model)
        if self._not_compiled is None:
            self._not_compiled = self._start_module(model)
        if self._not_compiled is None:
            return
        if self.__settings.contexts.across_workers:
            raise SettingsError(
                f"{SECTION}.contexts.across_workers: nothing can be shared, since {self._not_compiled}; archive the "
                "model file and its weights, or remove the setting"
            )
        logger.warning("%s: nothing is compiled, the handler serves as it is: %s", self.__name, self._not_compiled)

    def _start_module(self, module: torch.nn.Module) -> str | None:
        """Swap a handler's module; returns why that is not possible, or None."""
        folder = self.__context.system_properties.get("model_dir")
        source = ModuleSource(self.__name, module.eval(), recipe=self.__recipe, folder=folder)
        device = None if self.__settings.contexts.across_workers else device_of(module)
        restore = set_compile_aside(module)
        try:
            self.model = self._start(source, device)
        except (SettingsError, MissError):
            raise
        except Exception as error:
            restore()
            if self.__settings.strict or self.__settings.contexts.across_workers:
                raise
            logger.debug("details", exc_info=error)
            return f"{type(error).__name__}: {one_line(error)}"
        if self.model.outcome.backend == "eager" and self.model.background is None:
            restore()
        return None

    @property
    def model_device(self) -> torch.device:
        """Where the model runs; with ``across_workers`` `device`, where `preprocess` puts tensors, is the CPU."""
        return device_of_model(self)

    def _start(self, source: ModelSource, device: torch.device | None = None) -> ServedModel:
        if self.__settings.inputs or not self.__settings.samples:
            settings = self.__settings
            if settings.result_cache is not None:
                from ts_handlers.servers.torchserve.result_cache import settings_of_start

                settings = settings_of_start(settings, self.__config)
            return self._as_plain(start_model(source, settings, device or device_of_model(self)))
        from ts_handlers.servers.torchserve.samples import SampledStart

        sampled = self._sampled = SampledStart(self.__settings, type(self), self.__context, self.__config)
        return sampled.start(source, device or device_of_model(self))

    def _as_plain(self, model: ServedModel) -> ServedModel:
        return compile_as_plain(model, self.__config, self.__settings)

    def _load_pickled_model(
        self, model_dir: str, model_file: str, model_pt_path: str | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        """Answer `BaseHandler.initialize` with a model from the store."""
        below: Any = super()
        if args or kwargs or self._not_compiled:  # a signature of its own, or nothing to be compiled
            return below._load_pickled_model(model_dir, model_file, model_pt_path, *args, **kwargs)
        files = ArchiveFiles(model_dir, model_file, model_pt_path)
        overridden = type(self).load_model is not CompiledHandlerMixin.load_model
        build = own_build(self.load_model if overridden else None, below._load_pickled_model, files)
        source = source_of_archive(self.__name, type(self), files, self.__settings, build, self.__recipe)
        if self.__settings.models and files.model_file != EXPORTED:  # parts of it are compiled
            return source.eager()
        return self._start(source)

    def load_model(self, *args: Any, **kwargs: Any) -> Any:
        """Build the eager model. Override to build it in another way; called only when an artifact is built or checked.

        Parameters
        ----------
        model_dir, model_file, weights_path:
            The unpacked archive, the name of its model file, and the path of its weights or None.

        Returns
        -------
        The module with its weights loaded.
        """
        below: Any = getattr(super(), "load_model", None)
        if below is None:
            raise NotImplementedError
        return below(*args, **kwargs)  # a method of theirs that has this name

    def preprocess(self, data: Any, *args: Any, **kwargs: Any) -> Any:
        """The wrapped handler's preprocess; a ValueError in it refuses the request."""
        return super().preprocess(data, *args, **kwargs)  # type: ignore[misc]

    def inference(self, *args: Any, **kwargs: Any) -> Any:
        """The wrapped handler's inference; in place of `BaseHandler`'s own the model is called with a tensor or a tuple
        of tensors by position, with a mapping by name, and without declared inputs as `forward` takes it."""
        below: Any = super()
        if self._served is None or not is_base_handlers(below.inference, "inference"):
            return below.inference(*args, **kwargs)
        return self.model.call_with(*args, **kwargs)

    def handle(self, data: Any, context: Any) -> Any:
        """Answer a batch. A request that fails leaves the others alone: HTTP 400 when the model cannot answer it, 503
        when no execution context came free, and what TorchServe answers to a batch of one for any other error."""
        self.context = context
        batch = RequestBatch(data, context, self.request_meter)
        if self._submodels is not None:
            with self.request_meter.batch(data), self._submodels.batch(context):
                return self._answer(batch)
        served = self._served
        if served is not None:
            served.answering += 1
        try:
            with self.request_meter.batch(data):
                return self._answer(batch)
        finally:
            if served is not None:
                served.answering -= 1
                self._emitter.emit_all(getattr(context, "metrics", None), served.context_stats())

    def _answer(self, batch: RequestBatch) -> Any:
        below: Any = super()
        if inspect.iscoroutinefunction(below.handle):  # its answers are not there yet
            return self._answer_below(batch)
        if self._micro_batches is None or not batch.rows or os.environ.get("ENABLE_TORCH_PROFILER"):
            with self._shares.batch():
                together = self._kept(lambda part: answer_together(part, self._answer_below))
                return answer(batch, together, self._answer_below)
        return answer(batch, self._kept(self._answer_by_parts), self._answer_below)

    def _kept(self, together: Below) -> Below:
        """What answers predictions, from the result cache if there is one."""
        return together if self._results is None else self._results.around(together, self._answer_below)

    def _answer_by_parts(self, batch: RequestBatch) -> Any:
        if batch.asks_alone(0):
            return answer_together(batch, self._answer_below)
        assert self._micro_batches is not None
        started = time.perf_counter()
        answers = self._micro_batches.answer(batch, lambda part: answer_one_by_one(part, self._answer_below))
        batch.context.metrics.add_time("HandlerTime", round((time.perf_counter() - started) * 1000, 2), None, "ms")
        return answers

    def _is_describe(self) -> bool:
        """Whether the first request is TorchServe's describe; a prediction with its header is a prediction."""
        below: Any = super()
        batch = self._current.batch
        if batch is None or not is_base_handlers(below._is_describe, "_is_describe"):
            return bool(below._is_describe())
        return batch.is_describe()

    def _answer_below(self, batch: RequestBatch) -> Any:
        below: Any = super()
        with self._current.use(batch):
            found = answer_of_describe(below.handle, batch, self.describe_handle)
            return below.handle(batch.rows, batch.context) if found is None else found

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        adapt(cls, CompiledHandlerMixin)

    def request_body(self, row: Any) -> Any:
        """The body of one request: bytes, text or what TorchServe parsed from JSON.

        Raises
        ------
        InputError
            There is no body, or it is empty.
        """
        body = row.get("data", row.get("body")) if isinstance(row, dict) else row
        if body is None or (isinstance(body, (bytes, bytearray, str)) and not body):
            raise InputError(
                "the request has no body; send one with a Content-Type that TorchServe passes on, such as "
                "application/json or application/octet-stream"
            )
        return body

    def describe_handle(self) -> dict[str, Any]:
        """What TorchServe's describe API shows as ``customizedMetadata``."""
        served = self._served
        facts = describe_uncompiled(self, self._not_compiled) if served is None else served.describe()
        facts = facts if self._submodels is None else self._submodels.describe()
        facts["time"] = self._shares.describe()
        facts["progress"] = of_background(facts.get("background"))
        if self._results is not None:
            facts["result_cache"] = self._results.describe(facts.get("result_cache"))
        facts["pid"] = os.getpid()
        return with_their_description(facts, getattr(super(), "describe_handle", None))


wrap_methods(CompiledHandlerMixin)

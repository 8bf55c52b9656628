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
from ts_handlers.servers.json_tensors import (
    DEPENDENT_ROWS,
    NON_FINITE,
    NOT_BY_ROW,
    have_rows,
    is_finite,
    join_rows,
    read_tensors,
    rows_of,
    split_rows,
)
from ts_handlers.servers.torchserve.answering import answer, answer_one_by_one, answer_together
from ts_handlers.servers.torchserve.archive import (
    ArchiveFiles,
    gpu_of_worker,
    name_of_model,
    own_build,
    prepared_for_base_handler,
    refusing_weights_alone,
    source_of_archive,
)
from ts_handlers.servers.torchserve.base_handler import BaseHandler
from ts_handlers.servers.torchserve.envelopes import guard_envelope
from ts_handlers.servers.torchserve.metrics import Emitter
from ts_handlers.servers.torchserve.micro_batching import MicroBatches, check_contexts, read_micro_batching
from ts_handlers.servers.torchserve.recipes import handler_recipe
from ts_handlers.servers.torchserve.request_batch import CurrentBatch, RequestBatch
from ts_handlers.servers.torchserve.startup_timeout import warn_of_startup_timeout
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
    refusing,
    unwrapped,
    with_their_description,
)
from ts_handlers.settings import SECTION, Settings, parse_settings
from ts_handlers.start import start_model
from ts_handlers.system.cycle_collector import exempt_from_collection

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
    _micro_batches: MicroBatches | None = None
    _last_context: Any = None
    _gpu: torch.device | None = None
    _emitter: Emitter
    _not_compiled: str | None = None

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """Works for handlers that do not call their base class's constructor."""
        made = super().__new__(cls)
        made._current = CurrentBatch()
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
        self._start_module_of_base_handler()
        self._start_micro_batches()
        if self._served is not None:
            self._model_is_ready(context)

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
        try:
            self.model = self._start(source, device)
        except (SettingsError, MissError):
            raise
        except Exception as error:
            if self.__settings.strict or self.__settings.contexts.across_workers:
                raise
            logger.debug("details", exc_info=error)
            return f"{type(error).__name__}: {one_line(error)}"
        return None

    def _start_micro_batches(self) -> None:
        section = read_micro_batching(self.__config)
        below: Any = super()
        if section is None or "handle" in vars(self) or not is_base_handlers(below.handle, "handle"):
            return
        if not self.__settings.contexts.across_workers:
            check_contexts(section.parallelism.inference, self.__settings.contexts.count)
        device = torch.device(getattr(self, "device", None) or "cpu")
        self._micro_batches = MicroBatches(self, self._current, device, section)

    def _model_is_ready(self, context: Any) -> None:
        warn_of_startup_timeout(self.__config, self.model.metrics)
        self._emitter = Emitter(self.model.metrics)
        self._emitter.emit(getattr(context, "metrics", None))
        outcome = self.model.outcome
        exempt_from_collection(outcome.result == "built" or bool(outcome.fallbacks))
        if self.model.background is not None:
            self.model.background.when_done(lambda: self._after_swap(context))

    def _after_swap(self, context: Any) -> None:
        self._emitter.emit(getattr(context, "metrics", None))
        background = self.model.background
        background.wait_for_idle_window()  # a full pass holds the interpreter; a call under way holds the eager module
        exempt_from_collection(background.left_module)

    @property
    def model_device(self) -> torch.device:
        """Where the model runs; with ``across_workers`` `device`, where `preprocess` puts tensors, is the CPU."""
        return device_of_model(self)

    def _start(self, source: ModelSource, device: torch.device | None = None) -> ServedModel:
        model = start_model(source, self.__settings, device or device_of_model(self))
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
        return self._start(source_of_archive(self.__name, type(self), files, self.__settings, build, self.__recipe))

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
        served = self._served
        if served is not None:
            served.answering += 1
        try:
            return self._answer(RequestBatch(data, context))
        finally:
            if served is not None:
                served.answering -= 1
                torchserve_metrics = getattr(context, "metrics", None)
                self._emitter.emit(torchserve_metrics)
                self._emitter.emit_contexts(torchserve_metrics, served.context_stats())

    def _answer(self, batch: RequestBatch) -> Any:
        below: Any = super()
        if inspect.iscoroutinefunction(below.handle):  # its answers are not there yet
            return self._answer_below(batch)
        if self._micro_batches is None or not batch.rows or os.environ.get("ENABLE_TORCH_PROFILER"):
            return answer(batch, lambda part: answer_together(part, self._answer_below), self._answer_below)
        return answer(batch, self._answer_by_parts, self._answer_below)

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
        if "preprocess" in cls.__dict__:
            cls.preprocess = refusing(cls.__dict__["preprocess"])  # type: ignore[method-assign]
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
        facts["pid"] = os.getpid()
        return with_their_description(facts, getattr(super(), "describe_handle", None))


CompiledHandlerMixin.preprocess = refusing(CompiledHandlerMixin.preprocess)  # type: ignore[method-assign]


class CompiledHandler(CompiledHandlerMixin, BaseHandler):  # type: ignore[misc]
    """A TorchServe handler for tensors as JSON.

    A request is ``{input name: nested list}`` with the batch dimension included, or the bare nested list when the model
    has one input. Requests are joined along dimension 0 and their answers split again; they are answered one by one if
    an input or output has no row for each row of a request, and unless the start has found that a row is answered alone
    as it is among others (`ts_handlers.startup.rows`). Answers have the output's structure, tensors as lists, and None
    in place of NaN and infinity, or none at all with ``non_finite: refuse``.
    """

    _answers_alone = False

    def _start(self, source: ModelSource, device: torch.device | None = None) -> ServedModel:
        own = type(self).preprocess is CompiledHandler.preprocess
        if own and source.weights_by_name and self.settings.backends != ("eager",) and not self.settings.inputs:
            raise SettingsError(f"{SECTION}.inputs: needed by the default preprocess; declare them or override it")
        return super()._start(source, device)

    @staticmethod
    def _read_settings(config: Any) -> tuple[Settings, str | None]:
        return parse_settings(config), None  # its methods need a model of ours

    def preprocess(self, data: Any) -> Any:
        """JSON bodies to input tensors, concatenated along dimension 0."""
        specs = self.settings.inputs
        if not specs:
            raise SettingsError(f"{SECTION}.inputs: needed by the default preprocess; declare them or override it")
        if len(data) > 1 and (self._answers_alone or not have_rows(specs)):
            raise InputError(NOT_BY_ROW)
        if len(data) > 1 and not (isinstance(self.model, ServedModel) and self.model.outcome.independent_rows):
            raise InputError(DEPENDENT_ROWS)
        rows = [read_tensors(self.request_body(row), specs) for row in data]
        joined, self.batch_state.counts = join_rows(rows, specs)
        return joined

    def postprocess(self, data: Any) -> list[Any]:
        """One answer per request: the model's output for its rows, tensors as nested lists."""
        if self.settings.non_finite == "refuse" and not is_finite(data):
            raise InputError(NON_FINITE)
        answers = split_rows(data, self.batch_state.counts)
        if answers is None:
            self._answers_alone = True
            if len(self.batch_state.counts) > 1:
                raise InputError(NOT_BY_ROW)
        return answers or [rows_of(data)]

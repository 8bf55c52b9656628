"""The model that a server calls: it checks each call's inputs, runs the artifact and answers like the eager model.

`ServedModel` is what a server sees of a model, wherever that runs. `CompiledModel` runs in this process;
`ts_handlers.model_process.shared_model.SharedModel` in one that all workers of a server share.
"""

from __future__ import annotations

import abc
import dataclasses
import json
import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch

from ts_handlers.backends.base import Target
from ts_handlers.backends.calling import spreads
from ts_handlers.backends.eager import eager_run
from ts_handlers.errors import BuildError, BusyError, InputError
from ts_handlers.execution.background import Background
from ts_handlers.execution.base import Loaded, Run
from ts_handlers.execution.contexts import ContextPool, PoolStats
from ts_handlers.execution.outcome import Outcome
from ts_handlers.execution.slots import ModuleSlots
from ts_handlers.metrics import Metrics, compiled_graphs, graphs_for_requests
from ts_handlers.model.call_form import accepts, forward_order, given_by_name, other_form, to_device
from ts_handlers.model.changes import GuardedModel
from ts_handlers.model.explanations import explanations_under_way
from ts_handlers.model.module import ModuleSource
from ts_handlers.model.signature import Signature
from ts_handlers.store.base import Store

if TYPE_CHECKING:
    from ts_handlers.model.observed_calls import Observer

logger = logging.getLogger(__name__)

_FORMS_NAMED = 10
"""Forms of calls that `describe` names; a handler has a few."""


class ServedModel(GuardedModel, abc.ABC):
    """A model that is ready, as a server sees it.

    Call it as the eager module is called, from any number of threads: `contexts.count` calls run at once. What fits the
    declared inputs, by position or by name, is answered by the artifact. A call of another form (a flag, None, a
    container, an argument that is not declared) is answered by the eager module, counted as ``outside_eager`` and named
    in the log and in `describe`. Attributes are the eager module's; for changes of it see
    `ts_handlers.model.changes.GuardedModel`.

    Attributes
    ----------
    outcome, metrics:
        How the start ended, and its phases and counters.
    background:
        The build that goes on beside an eager model, or None.
    answering:
        Requests that a server is answering with this model, calls of it and what surrounds them; kept by the server.

    Raises
    ------
    InputError
        Shapes or values are outside the declared ranges and `outside` is ``refuse``; or neither the declared inputs nor
        the eager module take such arguments. Declared sizes that are not compiled are answered by the eager model.
    BusyError
        As many calls as can run at once were under way for `contexts.wait_seconds`.
    """

    def __init__(self, target: Target, outcome: Outcome, metrics: Metrics) -> None:
        super().__init__(target)
        self._target = target
        self.outcome = outcome
        self.metrics = metrics
        self.background: Background | None = None
        self.answering = 0
        self._other_forms: dict[str, int] = {}
        self._measured: Callable[[], AbstractContextManager[None]] | None = None
        self._when_called: tuple[Any, ...] = ()  # a module as an attribute would be the eager module's

    def compile_when_called(self, options: Mapping[str, Any]) -> None:
        """Answer the eager module's calls with `torch.compile` of it, which compiles at the first call in each process.

        Parameters
        ----------
        options:
            Those of `torch.compile`.
        """
        self._when_called = (torch.compile(self._eager_module(), **options),)

    def _module_at_hand(self) -> torch.nn.Module | None:
        when_called = self.__dict__.get("_when_called")
        return when_called[0] if when_called else super()._module_at_hand()

    @abc.abstractmethod
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model: tensors of any device in, in declared order or by name; the model's output out."""

    def call_with(self, data: Any, *args: Any, **kwargs: Any) -> Any:
        """Call the model with what a handler's `preprocess` gave: a mapping by name, a tuple or list by position.

        Where nothing is declared, `forward` gets all of it as one argument if it takes it so, as without this package;
        see `ts_handlers.backends.calling.spreads`.
        """
        if isinstance(data, Mapping):
            return self(*args, **data, **kwargs)
        return self(*data, *args, **kwargs) if isinstance(data, (tuple, list)) else self(data, *args, **kwargs)

    @property
    @abc.abstractmethod
    def signature(self) -> Signature:
        """What the model accepts; without inputs when nothing was declared."""

    @property
    def device(self) -> torch.device:
        """The device of the outputs."""
        return self._target.device

    @abc.abstractmethod
    def context_stats(self) -> PoolStats:
        """Gauges and counters of the execution contexts, as far as this process reports them."""

    @abc.abstractmethod
    def describe(self) -> dict[str, Any]:
        """Backend, key, hit or miss with the missed part, phases, counters and fallback reasons, JSON-compatible."""

    @property
    def _serving_module(self) -> torch.nn.Module | None:
        return self._eager_module() if explanations_under_way() else None

    def _explain(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call the eager module in the caller's gradient mode."""
        device = self._target.device
        return self._eager_module()(*to_device(args, device), **to_device(kwargs, device))

    def _answer_other_form(
        self, signature: Signature, args: tuple[Any, ...], kwargs: dict[str, Any], refusal: InputError
    ) -> Any:
        """Answer a call that the artifact has refused with the eager module, if that takes such arguments.

        Raises
        ------
        InputError
            `refusal`: it was for a shape or a value, or the eager module takes no such arguments either.
        """
        form = other_form(signature, args, kwargs) if self._target.source.weights_by_name else None
        if form is None or not accepts(self._eager_module(), args, kwargs):
            raise refusal
        signature.check_limits(given_by_name(signature, args, kwargs))
        self._count_other_form(form)
        try:
            return self._call_eager(args, kwargs)
        except RuntimeError as error:
            if "declared is" not in form or isinstance(error, torch.OutOfMemoryError):
                raise
            raise refusal from error  # a dtype that the eager module does not take either

    def _count_other_form(self, form: str) -> None:
        self.metrics.count("outside_eager")
        if form not in self._other_forms:
            if len(self._other_forms) >= _FORMS_NAMED:
                return
            name = self._target.source.name
            logger.warning("%s: called in a form that was not compiled, which eager answers: %s", name, form)
        self._other_forms[form] = self._other_forms.get(form, 0) + 1

    def _call_eager(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        return self._run_eager(to_device(args, self._target.device), to_device(kwargs, self._target.device))

    def _run_eager(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        # Not in inference mode: a handler may change an output in place, as it may change the module's own.
        with torch.no_grad():
            return (self._when_called[0] if self._when_called else self._eager_module())(*args, **kwargs)


class CompiledModel(ServedModel):
    """A model that runs in this process.

    Attributes
    ----------
    store:
        The store that the artifact came from, if any; it keeps the artifact's files while this object lives.
    """

    def __init__(self, target: Target, loaded: Loaded, outcome: Outcome, metrics: Metrics, slots: ModuleSlots) -> None:
        super().__init__(target, outcome, metrics)
        self._loaded = loaded  # `swap` replaces it, so a call reads it once
        self._device = target.device
        self._outside_eager = target.settings.outside == "eager"
        self._slots = slots
        self._eager: dict[tuple[str, ...], Run] = {}  # by the names of the inputs
        self._observer: Observer | None = None
        self._stays_eager: str | None = None
        self._epoch = 0  # of `serving_epoch`; read before `_loaded`, counted after that has changed
        self._answers: Callable[[int, Loaded, list[torch.Tensor]], Any] | None = None
        self._lock = threading.Lock()
        self._order = self._order_of_arguments()
        self.store: Store | None = None
        if self._device.type == "cuda":
            for pool in (slots.pool, loaded.pool):
                if pool is not None:
                    pool.favour_own()

    def _order_of_arguments(self) -> tuple[str, ...] | None:
        """How forward takes arguments by position, if that is not as the inputs are declared.

        Only of a module that exists at every start: a call must not mean one thing after a build, another after a hit.
        """
        source = self._target.source
        if not isinstance(source, ModuleSource):
            return None
        return forward_order(source.built(), self._loaded.signature.names)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if explanations_under_way():
            return self._explain(args, kwargs)
        try:
            if self._measured is None:
                return self._answer(args, kwargs)
            with self._measured():
                return self._answer(args, kwargs)
        finally:
            compiled = graphs_for_requests()
            if compiled:
                self.metrics.count("compile_after_ready", compiled)

    def _answer(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        epoch, loaded = self._epoch, self._loaded
        signature = loaded.signature
        if not signature.inputs:
            return self._noted(self._call_eager(args, kwargs), args, kwargs)
        given = args, kwargs
        if (
            self._order is not None
            and len(args) <= len(self._order)
            and kwargs.keys().isdisjoint(self._order[: len(args)])
        ):
            kwargs = {**dict(zip(self._order, args, strict=False)), **kwargs}
            args = ()
        try:
            try:
                tensors = signature.bind(args, kwargs, self._device)
                signature.check(tensors)
                return loaded.run(tensors) if self._answers is None else self._answers(epoch, loaded, tensors)
            except InputError as refusal:
                if other_form(signature, args, kwargs) is not None:
                    return self._noted(self._answer_other_form(signature, args, kwargs, refusal), *given)
                tensors = signature.bind(args, kwargs, self._device)  # a value outside its limits is refused anyway
                if not self._outside_eager:
                    self.signature.check(tensors)  # what is declared and not compiled is answered eagerly
        except InputError as error:
            self.metrics.count_refusal("refused", error)
            raise
        except BusyError as error:
            self.metrics.count_refusal("busy", error)
            raise
        self.metrics.count("outside_eager")
        return self._noted(self._slots.call(self.keep_eager(signature.names), tensors), *given)

    def keep_eager(self, names: tuple[str, ...]) -> Run:
        """Keep the eager module at hand for calls outside the ranges of inputs of these names; returns its `run`."""
        with self._lock:
            if names not in self._eager:
                self._eager[names] = eager_run(self._target, names)
            return self._eager[names]

    def observe(self, observer: Observer | None) -> None:
        """Have the calls that the eager module answers noted from now on."""
        self._observer = observer

    def _noted(self, answer: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        if self._observer is not None:
            self._observer.note(args, kwargs)
        return answer

    def call_with(self, data: Any, *args: Any, **kwargs: Any) -> Any:
        """Call the model with what a handler's `preprocess` gave."""
        if self.signature.inputs or spreads(self._target.eager(), data):
            return super().call_with(data, *args, **kwargs)
        return self(data, *args, **kwargs)

    def _call_eager(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        return self._slots.call(self._run_eager, to_device(args, self._device), to_device(kwargs, self._device))

    def swap(self, other: CompiledModel) -> None:
        """Serve from the next call on what `other` serves; calls that are running end as they began.

        Raises
        ------
        BuildError
            The model stays eager, see `return_to_eager`.
        """
        with self._lock:
            if self._stays_eager is not None:
                raise BuildError(self._stays_eager)
            before, names = self._loaded, other._loaded.signature.names
            if self._outside_eager and before.signature.names == names and self.outcome.backend == "eager":
                self._eager[names] = before.run
            if not self._target.declares_as(other._target):  # calls have told the other one's
                self._target = self._made_for = other._target
                self._outside_eager = other._outside_eager
                self._order = other._order
            self.store = other.store
            self._slots = other._slots
            self._when_called = ()  # calls that the artifact does not take are the eager module's
            self._loaded = other._loaded
            self.outcome = other.outcome  # after it: who sees the new outcome is answered by what that tells of
            self._epoch += 1

    def return_to_eager(self, reason: str) -> None:
        """Serve the eager module from the next call on and for good, for a reason that `describe` shows."""
        with self._lock:
            self._stays_eager = reason
            if self.outcome.backend != "eager":
                signature = self._loaded.signature
                eager = Loaded(eager_run(self._target, signature.names), signature)
                self._loaded = self._slots.wrap(eager)
                self.outcome = dataclasses.replace(self.outcome, backend="eager", notes=(*self.outcome.notes, reason))
                self._epoch += 1

    @property
    def signature(self) -> Signature:
        """What the model accepts: what is declared, also where the artifact covers a part of it."""
        accepted, declared = self._loaded.signature, self._target.signature
        if declared is None or declared.dimensions == accepted.dimensions:
            return accepted
        if set(declared.dimensions) != set(accepted.dimensions):
            return accepted
        return Signature(accepted.inputs, declared.dimensions, accepted.kind)

    @property
    def _serving_module(self) -> torch.nn.Module | None:
        # With a build in the background it would be lost with the swap.
        refused = self.background is not None or (self._observer is not None and self._observer.refuses_changes)
        serves = self.outcome.backend == "eager" and not refused
        return self._eager_module() if serves else super()._serving_module

    def _module_to_change(self) -> torch.nn.Module | None:
        return super()._module_to_change() or (None if self._observer is None else self._observer.give_way())

    @property
    def pool(self) -> ContextPool[Any]:
        """The pool from which calls are lent their slots."""
        return self._loaded.pool or self._slots.pool

    def context_stats(self) -> PoolStats:
        """Gauges and counters of `pool`."""
        return self.pool.stats()

    def describe(self) -> dict[str, Any]:
        """Backend, key, hit or miss with the missed part, phases, counters and fallback reasons, JSON-compatible."""
        facts = dataclasses.asdict(self.outcome)
        facts["phases_ms"] = {name: round(value, 1) for name, value in self.metrics.phases_ms.items()}
        facts["build_ms"] = {name: round(value, 1) for name, value in self.metrics.build_ms.items()}
        facts["counters"] = dict(self.metrics.counters)
        facts["other_forms"] = dict(self._other_forms)
        facts["artifact"] = dict(self._loaded.facts)
        facts["contexts"] = dataclasses.asdict(self.context_stats())
        facts["device"] = str(self._device)
        facts["graphs_in_process"] = compiled_graphs()
        facts["background"] = None if self.background is None else self.background.describe()
        facts["observed"] = None if self._observer is None else self._observer.describe()
        facts["result_cache"] = getattr(self._answers, "describe", lambda: None)()
        return facts


def answer_calls_with(model: CompiledModel, answers: Callable[[int, Loaded, list[torch.Tensor]], Any] | None) -> None:
    """Have calls that an artifact answers go to `answers`, with `serving_epoch`, what serves, and checked tensors."""
    model._answers = answers


def serving_epoch(model: ServedModel) -> int:
    """How often what serves has changed; read before a call, it tells that nothing older has answered."""
    return model._epoch if isinstance(model, CompiledModel) else 0


def count_other_form(model: ServedModel, form: str) -> None:
    """Count a call that differs from the declared inputs in `form`, and that somebody else answers eagerly."""
    model._count_other_form(form)


def eager_module(model: ServedModel) -> torch.nn.Module | None:
    """The eager module of a model if it is there; builds none."""
    return model._module_at_hand()


def measure_calls(model: ServedModel, measured: Callable[[], AbstractContextManager[None]] | None) -> None:
    """Call a model of this process inside a context that `measured` gives for each call; with None no more."""
    model._measured = measured


def log_outcome(event: str, name: str, model: ServedModel) -> None:
    """Log what a model has become as one structured line."""
    facts = model.describe()
    wanted = ("backend", "key", "result", "missed", "fallbacks", "phases_ms")
    logger.info("ts_handlers %s %s", event, json.dumps({"model": name, **{key: facts[key] for key in wanted}}))

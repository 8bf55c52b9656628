"""From settings to a model that is ready: key, lookup, load or build, canary, warm-up, and the fallback order.

One way through::

    settings -> key -> lookup --+-- hit --> load --> canary --> warm-up --> ready
                                +-- miss -> lease --> build --> load --> canary --> publish --> load ...

One backend's attempt is `ts_handlers.startup.attempt`; here is the order in which they are tried.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import torch

from ts_handlers.backends import get_backend
from ts_handlers.backends.base import Backend, Target
from ts_handlers.compiled_model import CompiledModel, log_outcome
from ts_handlers.errors import FINAL, BuildError, MissError, RefitError, one_line, without_frames
from ts_handlers.execution.background import Background
from ts_handlers.execution.outcome import Outcome
from ts_handlers.execution.slots import ModuleSlots
from ts_handlers.execution.torch_device import begin_cuda
from ts_handlers.metrics import Metrics, start_under_way
from ts_handlers.model.base import ModelSource
from ts_handlers.settings import SECTION, Settings
from ts_handlers.settings.sections import GuardSettings
from ts_handlers.startup.address import address_in_store
from ts_handlers.startup.attempt import Attempt
from ts_handlers.startup.base import IdleWindows, Served, Start
from ts_handlers.startup.inputs import try_eager
from ts_handlers.startup.preparation import prepare
from ts_handlers.startup.recording import recorded_start
from ts_handlers.startup.target import new_target
from ts_handlers.store.address import Address
from ts_handlers.store.base import Store
from ts_handlers.store.opening import open_store

if TYPE_CHECKING:
    from ts_handlers.model.declaration import Declaration
    from ts_handlers.startup.observed_sizes import ObservedSizes

logger = logging.getLogger(__name__)

Progress = Callable[[str, "float | None"], None]


def start_here(
    source: ModelSource,
    settings: Settings,
    device: torch.device | str = "cpu",
    *,
    progress: Progress | None = None,
    retry_failed: bool = False,
    event: str = "start",
    observed: tuple[str, Declaration] | None = None,
) -> CompiledModel:
    """Make a model ready in this process; the arguments and errors are those of `ts_handlers.start.start_model`."""
    metrics = Metrics.of_this_process()
    target = new_target(source, settings, device)
    begin_cuda(target.device)
    start = _Starter(target, metrics, retry_failed)
    if observed is not None:
        start.identity, start.declared = observed
    if progress is not None:
        metrics.observer = lambda phase: progress(phase, start.estimate)
    with recorded_start(source.name if event == "start" else None, metrics) as ended:
        model = ended(start.run())
    log_outcome(event, source.name, model)
    if model.outcome.fallbacks:
        from ts_handlers.startup.advice import fallback_line

        logger.warning(fallback_line(source.name, model.outcome))
    if model.store is not None and (metrics.counters["build"] or metrics.counters["canary_recorded"]):
        from ts_handlers.store.upkeep.space import make_room_in_background

        make_room_in_background(
            model.store.state_directory, settings.space, lambda report: metrics.count("evicted", report.evicted)
        )
    return model


def _place(instead: Backend | None, remaining: list[Backend]) -> int:
    """Where in the fallback order a substitute is tried: at once, or after the backend that it follows."""
    follows = getattr(instead, "follows", None)
    return next((index + 1 for index, each in enumerate(remaining) if each.name == follows), 0)


class _Starter:
    """One start: tries one backend after the other and remembers what happened."""

    def __init__(
        self,
        target: Target,
        metrics: Metrics,
        retry_failed: bool = False,
        windows: IdleWindows | None = None,
    ) -> None:
        self._target = target
        self._metrics = metrics
        self._settings = target.settings
        self._retry_since = time.time() if retry_failed or target.settings.strict else None
        self._fallbacks: list[dict[str, str]] = []
        self._notes: list[str] = []
        self._windows = windows
        self._store: Store | None = None
        self._slots = ModuleSlots(target.settings.contexts, target.device)
        self.identity: str | None = None
        self.declared: Declaration | None = None
        self._sizes: ObservedSizes | None = None
        self.estimate: float | None = None

    def run(self) -> CompiledModel:
        with start_under_way():
            return self._run()

    def _run(self) -> CompiledModel:
        remaining = [get_backend(name) for name in self._settings.backends]
        if self._lacks_inputs(remaining):
            remaining = self._as_observed(remaining)
        elif self._settings.warmup == "observed":
            self._warm_up_as_observed()
        last: Exception | None = None
        missed: MissError | None = None  # of a backend whose part others may cover: they are looked up too
        while remaining:
            backend = remaining.pop(0)
            try:
                return self._try(backend, remaining)
            except Exception as error:
                instead = backend.substitute(self._settings, error)
                later = _place(instead, remaining)
                if later and isinstance(error, MissError):
                    missed = MissError(str(error))
                # A miss is final with `on_miss: fail`, unless the backend substitutes a quarantined one, or leaves
                # sizes to others, whose entries are looked up then.
                others = missed is not None and (later > 0 or any(each.persistent for each in remaining))
                goes_on = isinstance(error, MissError) and (self._metrics.counters["quarantined"] > 0 or others)
                strict = self._settings.strict and not isinstance(error, RefitError)  # which the same backend mends
                if strict or (isinstance(error, FINAL) and not goes_on):
                    if missed is not None and isinstance(error, MissError):
                        raise missed from None
                    raise
                logger.debug("details", exc_info=error)
                if instead is not None:
                    remaining.insert(later, instead)
                last = without_frames(error)  # whose frames hold what failed
                reason = f"{type(error).__name__}: {one_line(error)}"
                logger.warning("%s: backend %s failed: %s", self._target.source.name, backend.name, reason)
                self._fallbacks.append({"backend": backend.name, "reason": reason})
                self._metrics.count("fallback")
                self._target.release()  # a failed build may have run the module and changed its state
        assert last is not None
        if "eager" in self._settings.backends:
            raise last
        logger.warning("%s: every backend failed; serving eagerly", self._target.source.name)
        return self._try(get_backend("eager"))

    def _lacks_inputs(self, backends: list[Backend]) -> bool:
        compiles = any(backend.persistent for backend in backends)
        return compiles and self._target.source.weights_by_name and self._target.signature is None

    def _as_observed(self, backends: list[Backend]) -> list[Backend]:
        """The backends, for the inputs that earlier calls have told; without such calls those that need no inputs."""
        if self._settings.observing is not None:
            from ts_handlers.startup.observation import identity_of

            self.identity = identity_of(self._target)
        if self.identity is not None:
            self.declared = self._open_store().read_declaration(self.identity)
        if self.declared is None:
            return self._without_inputs(backends)
        self._adopt(self.declared.applied_to(self._settings))
        return [get_backend(name) for name in self._settings.backends]

    def _warm_up_as_observed(self) -> None:
        """Take the sizes that calls had most often for warm-up; where they are not known yet, count them."""
        from ts_handlers.startup.observed_sizes import ObservedSizes

        limits = self._settings.observing
        if self._target.signature is None or limits is None:
            return
        self._sizes = ObservedSizes(self._target, self._open_store(), limits)
        self._adopt(msgspec.structs.replace(self._settings, warmup=self._sizes.known() or ()))

    def _adopt(self, settings: Settings) -> None:
        self._settings = settings
        self._target = new_target(self._target.source, settings, self._target.device)

    def _observe(self, model: CompiledModel) -> None:
        """Have calls noted where nobody has declared the inputs, if another process can build the model."""
        limits, source = self._settings.observing, self._target.source
        if self.identity is None or limits is None or source.recipe() is None:
            return
        from ts_handlers.startup.observation import Observation

        device = self._target.device
        if device.type == "cuda" and device.index is None:  # a thread of its own begins the build
            device = torch.device("cuda", torch.cuda.current_device())

        def build(model: CompiledModel, declaration: Declaration, published: Callable[[], None]) -> Background:
            settings = declaration.applied_to(self._settings)
            beside = _Starter(new_target(source, settings, device), Metrics())
            beside._store = self._store
            backend = next((each for each in map(get_backend, settings.backends) if each.persistent), None)
            if backend is None:
                raise BuildError(
                    f"the inputs may be indices, whose limits the backends {', '.join(self._settings.backends)} do not "
                    "find; declare inputs with limits, or name the backend aot_inductor"
                )
            names = tuple(spec.name for spec in declaration.inputs)

            def load(name: str, windows: IdleWindows) -> CompiledModel:
                observation.check_module()
                model.keep_eager(names)  # what answers now answers calls outside the ranges afterwards
                module = source.eager()
                try:
                    fresh = beside._load_beside(name, windows)
                finally:
                    source.keep(module)
                observation.check_module()  # the model has served meanwhile
                return fresh

            return beside._build_beside(model, backend, load, published)

        asked = bool(self._settings.samples)
        observation = Observation(model, self._open_store(), self.identity, limits, self.declared, build, asked)
        model.observe(observation)

    def _without_inputs(self, backends: list[Backend]) -> list[Backend]:
        """The backends that need no inputs, `eager` at least; the others are recorded as failed, with a proposal.

        Raises
        ------
        SettingsError
            An artifact was asked for in earnest: `strict: true` or `on_miss: fail`.
        """
        from ts_handlers.model.proposal import proposal_text

        if self._settings.strict or self._settings.on_miss == "fail":
            self._target.require_signature()
        reason = f"{SECTION}.inputs: a compiling backend needs the model's inputs, found none" + proposal_text(
            self._target.eager
        )
        logger.warning("%s: serving eagerly: %s", self._target.source.name, reason)
        for backend in backends:
            if backend.persistent:
                self._fallbacks.append({"backend": backend.name, "reason": f"SettingsError: {reason}"})
                self._metrics.count("fallback")
        return [backend for backend in backends if not backend.persistent] or [get_backend("eager")]

    def _try(self, backend: Backend, others: Sequence[Backend] = ()) -> CompiledModel:
        if not backend.persistent:
            with self._metrics.phase("load"):
                loaded = backend.load(self._target, Path(), {})
            with self._metrics.phase("warmup"):
                rows = try_eager(self._target, loaded, self._notes)
            return self._ready(backend, Served(loaded, "eager", None, rows))
        attempt, address, store = self._attempt(backend)
        served = attempt.find()
        if served is not None:
            return self._ready(backend, served, attempt.key.digest)
        if self._settings.on_miss == "fail":
            raise MissError(
                f"no entry for {self._target.source.name} with backend {backend.name} (key {attempt.key.digest}) in "
                f"{store.name}, and on_miss is 'fail'; missed: {', '.join(attempt.missed) or 'everything'}. Build it "
                "where on_miss is 'compile' with the same archive, device and toolchain"
            )
        if self._settings.on_miss == "eager":
            return self._try(get_backend("eager"))
        attempt.refuse_build()
        if attempt.failed_before:
            lower = next((other.name for other in others if self._has_entry(other)), None)
            attempt.postpone_build(lower)
        if self._settings.on_miss == "background":
            return self._serve_eagerly_meanwhile(backend, attempt.missed)
        self.estimate = store.build_estimate(address)
        if self._metrics.recorder is not None:
            self._metrics.recorder.expects(self.estimate)
        served = attempt.build(self.estimate)
        return self._ready(backend, served, attempt.key.digest, attempt.missed)

    def _attempt(self, backend: Backend) -> tuple[Attempt, Address, Store]:
        store = self._open_store()
        with self._metrics.phase("key"):
            address = address_in_store(backend, self._target, store)
        start = Start(self._target, self._metrics, self._slots, store, self._notes, self._retry_since, self._windows)
        return Attempt(start, backend, address), address, store

    def _has_entry(self, backend: Backend) -> bool:
        """Whether a backend further down has an entry, so that nobody need wait for a build that failed before."""
        if not backend.persistent:
            return False
        try:
            return self._attempt(backend)[0].has_entry()
        except Exception as error:  # this backend's own attempt will tell
            logger.debug("no look for the entry of %s: %s", backend.name, error)
            return False

    def _open_store(self) -> Store:
        if self._store is None:
            self._store, problem = open_store(self._settings, self._metrics)
            if problem is not None:
                self._metrics.count("fallback")
                self._fallbacks.append({"backend": "store", "reason": problem})
        return self._store

    def _serve_eagerly_meanwhile(self, backend: Backend, missed: tuple[str, ...]) -> CompiledModel:
        """Serve eagerly while a child process builds, and then what it has built."""
        self._target.source.prepare()
        model = self._try(get_backend("eager"))
        model.outcome = dataclasses.replace(model.outcome, result="background", missed=missed)
        self._build_beside(model, backend, self._load_beside)
        return model

    def _build_beside(
        self,
        model: CompiledModel,
        backend: Backend,
        load: Callable[[str, IdleWindows], CompiledModel],
        published: Callable[[], None] = lambda: None,
    ) -> Background:
        """Begin a build in a child process, with which `model` is swapped afterwards."""
        from ts_handlers.startup.background.build import BackgroundBuild

        store = self._open_store()
        address = address_in_store(backend, self._target, store)  # of what making the eager model has read, too
        names = self._target.source.surroundings.names
        if names:
            store.write_outside(address.key.base.digest, names)
        retry_failed = self._retry_since is not None
        build = BackgroundBuild(model, self._target, backend, store, address, load, retry_failed, published)
        model.background = build
        build.begin()
        return build

    def _load_beside(self, backend: str, windows: IdleWindows) -> CompiledModel:
        """Start from the entry of a backend that is there now, and from nothing else, beside the model that serves.

        Without limits, which hold for the whole process and would end or fail requests: the child has loaded and
        checked the artifact under them. And without CUDA graphs: recording them would disturb requests.
        """
        settings = msgspec.structs.replace(
            self._settings,
            backends=(backend,),
            on_miss="fail",
            strict=True,
            guard=GuardSettings(load_seconds=None),
            contexts=msgspec.structs.replace(self._settings.contexts, cuda_graphs=False),
        )
        target = new_target(self._target.source, settings, self._target.device)
        target.kept.wanted = False  # the module that would be put back serves meanwhile
        start = _Starter(target, Metrics(), windows=windows)
        start._store, start._sizes = self._store, self._sizes
        if self._settings.contexts.cuda_graphs:
            start._notes.append("without CUDA graphs until the next start")
        return start.run()

    def _ready(
        self, backend: Backend, served: Served, key: str | None = None, missed: tuple[str, ...] = ()
    ) -> CompiledModel:
        outcome = Outcome(
            backend=backend.name,
            key=key,
            result=served.result,
            missed=missed,
            fallbacks=tuple(self._fallbacks),
            canary=served.canary,
            notes=(*self._notes, *self._target.source.notes, *(self._store.notes if self._store is not None else ())),
            independent_rows=served.independent_rows,
        )
        if backend.needs_eager_module:
            self._target.begin_serving()
        else:
            self._target.release()
            self._target.kept.wanted = False
            if served.result == "built" and self._target.device.type == "cuda":
                torch.cuda.empty_cache()  # what the build leaves in torch's allocator
        loaded = prepare(served.loaded, None, self._slots).served
        if self._sizes is not None:
            loaded = dataclasses.replace(loaded, run=self._sizes.around(loaded.run))
        model = CompiledModel(self._target, loaded, outcome, self._metrics, self._slots)
        model.store = self._store  # keeps the entry from being evicted while the model is served
        self._observe(model)
        return model

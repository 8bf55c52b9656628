"""From settings to a model that is ready: key, lookup, load or build, canary, warm-up, and the fallback ladder.

One way through::

    settings -> key -> lookup --+-- hit --> load --> canary --> warm-up --> ready
                                +-- miss -> lease --> build --> load --> canary --> publish --> load ...

One backend's turn is `ts_handlers.attempt`; here is the ladder of them.

Nothing here knows TorchServe; `start_model` works in any Python server.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import torch

from ts_handlers import fingerprint
from ts_handlers.attempt import Attempt, Served
from ts_handlers.backends import RELEASES_EAGER, get_backend, stand_in
from ts_handlers.backends.base import Backend, Request
from ts_handlers.compiled_model import CompiledModel, Outcome
from ts_handlers.errors import FINAL, MissError, RefitError, one_line
from ts_handlers.key import compute_key
from ts_handlers.metrics import Metrics
from ts_handlers.model_source import ModelSource
from ts_handlers.serving.slots import ModuleSlots
from ts_handlers.serving.torch_device import begin_cuda
from ts_handlers.settings import Settings
from ts_handlers.settings.sections import GuardSettings
from ts_handlers.store.base import Address, Store
from ts_handlers.store.opening import open_store, weights_digester

logger = logging.getLogger(__name__)

Progress = Callable[[str, "float | None"], None]


def start_model(
    source: ModelSource,
    settings: Settings,
    device: torch.device | str = "cpu",
    *,
    progress: Progress | None = None,
    retry_failed: bool = False,
    event: str = "start",
) -> CompiledModel:
    """Make a model ready: load it from the store, or build and publish it first.

    With ``contexts: {across_workers: true}`` that happens in another process, which is started if need be, and this one
    gets a model on the CPU that calls it there; see `ts_handlers.model_process`.

    Parameters
    ----------
    source:
        Where the model comes from; see `ts_handlers.model_source`.
    settings:
        See `ts_handlers.settings.parse_settings`.
    device:
        Where it runs. Call `torch.cuda.set_device` before, as the handler does.
    progress:
        Called when a phase begins, with its name and the seconds that the build took the last time, if that is known.
    retry_failed:
        Build what has failed a short time ago, too, as with `strict: true`.
    event:
        How the log calls it.

    Raises
    ------
    ModelError, SettingsError
        The model or the settings are wrong.
    MissError
        `on_miss: fail` and there is no entry.
    WarmStartError
        `strict: true` and a backend failed.

    Examples
    --------
    >>> import tempfile, torch
    >>> from ts_handlers import ModuleSource, Settings, start_model
    >>> model = start_model(ModuleSource("linear", torch.nn.Linear(2, 1)), Settings(backends=("eager",)))
    >>> model(torch.zeros(3, 2)).shape, model.outcome.backend
    (torch.Size([3, 1]), 'eager')
    """
    if settings.contexts.across_workers:
        from ts_handlers.model_process.shared_model import join_model

        return join_model(source, settings, torch.device(device))
    metrics = Metrics.of_this_process()
    request = Request(source, settings, torch.device(device))
    begin_cuda(request.device)
    start = _Start(request, metrics, retry_failed)
    if progress is not None:
        metrics.observer = lambda phase: progress(phase, start.estimate)
    model = start.run()
    log_outcome(event, source.name, model)
    if model.store is not None and (metrics.counters["build"] or metrics.counters["canary_recorded"]):
        from ts_handlers.store.space import make_room_in_background

        root, space = model.store.root, settings.space
        make_room_in_background(root, space, lambda report: metrics.count("evicted", report.evicted))
    return model


class _Start:
    """One start: walks the ladder and remembers what happened."""

    def __init__(
        self,
        request: Request,
        metrics: Metrics,
        retry_failed: bool = False,
        turn: Callable[[], None] | None = None,
    ) -> None:
        self._request = request
        self._metrics = metrics
        self._settings = request.settings
        self._anew_since = time.time() if retry_failed or request.settings.strict else None
        self._fallbacks: list[dict[str, str]] = []
        self._notes: list[str] = []
        self._turn = turn
        self._store: Store | None = None
        self._slots = ModuleSlots(request.settings.contexts, request.device)
        self.estimate: float | None = None

    def run(self) -> CompiledModel:
        ladder = [get_backend(name) for name in self._settings.backends]
        if any(backend.persistent for backend in ladder):
            self._request.source.begin_digest(weights_digester(self._settings))
            if self._request.source.weights_by_name:
                self._request.require_signature()
        last: Exception | None = None
        while ladder:
            backend = ladder.pop(0)
            try:
                return self._try(backend)
            except Exception as error:
                # A miss is final with `on_miss: fail`, unless the backend stands in for a quarantined one.
                stands_in = isinstance(error, MissError) and self._metrics.counters["quarantined"] > 0
                strict = self._settings.strict and not isinstance(error, RefitError)  # which the same backend mends
                if strict or (isinstance(error, FINAL) and not stands_in):
                    raise
                logger.debug("details", exc_info=error)
                instead = stand_in(backend, self._settings, error)
                if instead is not None:
                    ladder.insert(0, instead)
                last = error.with_traceback(None)  # whose frames hold what failed
                reason = f"{type(error).__name__}: {one_line(error)}"
                logger.warning("%s: backend %s failed: %s", self._request.source.name, backend.name, reason)
                self._fallbacks.append({"backend": backend.name, "reason": reason})
                self._metrics.count("fallback")
                self._request.source.release()  # a failed build may have run the module and changed its state
        assert last is not None
        if "eager" in self._settings.backends:
            raise last
        logger.warning("%s: every backend failed; serving eagerly", self._request.source.name)
        return self._try(get_backend("eager"))

    def _try(self, backend: Backend) -> CompiledModel:
        if not backend.persistent:
            with self._metrics.phase("load"):
                loaded = backend.load(self._request, Path(), {})
            return self._ready(backend, Served(loaded, "eager", None))
        with self._metrics.phase("key"):
            key = compute_key(backend, self._request)
            address = Address(
                model=self._request.source.name,
                model_digest=self._request.model_digest,
                device=fingerprint.device_slug(self._request.device),
                key=key,
            )
        store = self._open_store()
        attempt = Attempt(
            self._request,
            self._metrics,
            self._slots,
            backend,
            store,
            address,
            self._notes,
            self._anew_since,
            self._turn,
        )
        served = attempt.find()
        if served is not None:
            return self._ready(backend, served, key.digest)
        if self._settings.on_miss == "fail":
            raise MissError(
                f"no entry for {self._request.source.name} with backend {backend.name} (key {key.digest}) in "
                f"{store.root}, and on_miss is 'fail'; missed: {', '.join(attempt.missed) or 'everything'}. Build it "
                "where on_miss is 'compile' with the same archive, device and toolchain"
            )
        if self._settings.on_miss == "eager":
            return self._try(get_backend("eager"))
        attempt.refuse_build()
        if self._settings.on_miss == "background":
            return self._serve_eagerly_meanwhile(backend, store, address, attempt.missed)
        self.estimate = store.build_estimate(address)
        return self._ready(backend, attempt.build(self.estimate), key.digest, attempt.missed)

    def _open_store(self) -> Store:
        if self._store is None:
            self._store, problem = open_store(self._settings, self._metrics)
            if problem is not None:
                self._metrics.count("fallback")
                self._fallbacks.append({"backend": "store", "reason": problem})
        return self._store

    def _serve_eagerly_meanwhile(
        self, backend: Backend, store: Store, address: Address, missed: tuple[str, ...]
    ) -> CompiledModel:
        """Serve eagerly while a child process builds, and then what it has built."""
        from ts_handlers.background import BackgroundBuild

        def load(built: str, turn: Callable[[], None]) -> CompiledModel:
            """An ordinary start from the entry that is there now, and nothing else.

            Without limits, which hold for the whole process and would end or fail requests: the child has loaded and
            checked the artifact under them. And without CUDA graphs: recording them would disturb requests.
            """
            settings = msgspec.structs.replace(
                self._settings,
                backends=(built,),
                on_miss="fail",
                strict=True,
                guard=GuardSettings(load_seconds=None),
                contexts=msgspec.structs.replace(self._settings.contexts, cuda_graphs=False),
            )
            start = _Start(Request(self._request.source, settings, self._request.device), Metrics(), turn=turn)
            start._store = store
            if self._settings.contexts.cuda_graphs:
                start._notes.append("without CUDA graphs until the next start")
            return start.run()

        self._request.source.prepare()
        model = self._try(get_backend("eager"))
        model.outcome = dataclasses.replace(model.outcome, result="background", missed=missed)
        retry_failed = self._anew_since is not None
        model.background = BackgroundBuild(model, self._request, backend, store, address, load, retry_failed)
        model.background.begin()
        return model

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
            notes=(*self._notes, *(self._store.notes if self._store is not None else ())),
        )
        if backend.name in RELEASES_EAGER:
            self._request.source.release()
            if served.result == "built" and self._request.device.type == "cuda":
                torch.cuda.empty_cache()  # what the build leaves in torch's allocator
        loaded = self._slots.wrap(served.loaded)
        model = CompiledModel(self._request, loaded, outcome, self._metrics, self._slots)
        model.store = self._store  # keeps the entry from being evicted while the model is served
        return model


def log_outcome(event: str, name: str, model: CompiledModel) -> None:
    """Log what a model has become as one structured line."""
    facts = model.describe()
    wanted = ("backend", "key", "result", "missed", "fallbacks", "phases_ms")
    logger.info("ts_handlers %s %s", event, json.dumps({"model": name, **{key: facts[key] for key in wanted}}))

"""From settings to a model that is ready: key, lookup, load or build, canary, warm-up, and the fallback ladder.

One way through::

    settings -> key -> lookup --+-- hit --> load --> canary --> warm-up --> ready
                                +-- miss -> lease --> build --> load --> canary --> publish --> load ...

Native code runs under the crash guard, see `ts_handlers.store.guard`.

Nothing here knows TorchServe; `start_model` works in any Python server.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import platform
import re
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import torch

import ts_handlers
from ts_handlers import fingerprint
from ts_handlers.backends import get_backend, stand_in
from ts_handlers.backends.base import Backend, Loaded, Request
from ts_handlers.compiled_model import CompiledModel, Outcome
from ts_handlers.cycle_collector import collection_paused
from ts_handlers.errors import (
    CanaryError,
    MissError,
    ModelError,
    QuarantinedError,
    RefitError,
    SettingsError,
    StoreError,
)
from ts_handlers.key import CacheKey, compute_key
from ts_handlers.metrics import Metrics, process_age_ms
from ts_handlers.model_source import ModelSource
from ts_handlers.serving.slots import ModuleSlots
from ts_handlers.serving.torch_device import begin_cuda
from ts_handlers.settings import Settings
from ts_handlers.settings.sections import GuardSettings
from ts_handlers.store.base import Address, Corrupt, Hit, Miss, Store
from ts_handlers.store.entry import Manifest, list_files, read_manifest
from ts_handlers.store.guard import Guard
from ts_handlers.store.opening import open_store, weights_digester
from ts_handlers.warmup import check_canary, run_warmup

logger = logging.getLogger(__name__)

# Errors of the archive or of the settings: no other backend would do better.
_FINAL = (ModelError, SettingsError, MissError)

Progress = Callable[[str, "float | None"], None]


def start_model(
    source: ModelSource,
    settings: Settings,
    device: torch.device | str = "cpu",
    *,
    progress: Progress | None = None,
) -> CompiledModel:
    """Make a model ready: load it from the store, or build and publish it first.

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
    metrics = Metrics()
    age = process_age_ms()
    if age is not None:
        metrics.phases_ms["process"] = age
    request = Request(source, settings, torch.device(device))
    begin_cuda(request.device)
    start = _Start(request, metrics)
    if progress is not None:
        metrics.observer = lambda phase: progress(phase, start.estimate)
    model = start.run()
    log_outcome("start" if progress is None else "build", source.name, model)
    if metrics.counters["build"] and model.store is not None:
        from ts_handlers.store.space import make_room_in_background

        root, space = model.store.root, settings.space
        make_room_in_background(root, space, lambda report: metrics.count("evicted", report.evicted))
    return model


class _Start:
    """One start: walks the ladder and remembers what happened."""

    def __init__(self, request: Request, metrics: Metrics) -> None:
        self._request = request
        self._metrics = metrics
        self._settings = request.settings
        self._fallbacks: list[dict[str, str]] = []
        self._notes: list[str] = []
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
                if strict or (isinstance(error, _FINAL) and not stands_in):
                    raise
                instead = stand_in(backend, self._settings, error)
                if instead is not None:
                    ladder.insert(0, instead)
                last = error
                reason = f"{type(error).__name__}: {_one_line(error)}"
                logger.warning("%s: backend %s failed: %s", self._request.source.name, backend.name, reason)
                logger.debug("details", exc_info=error)
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
            return self._ready(backend, loaded, None, "eager", ())
        with self._metrics.phase("key"):
            key = compute_key(backend, self._request)
            address = Address(
                model=self._request.source.name,
                model_digest=self._request.model_digest,
                device=fingerprint.device_slug(self._request.device),
                key=key,
            )
        store = self._open_store()
        guard = Guard(store.root, self._settings, key, address.model, self._request.source.weights_digest)
        with self._metrics.phase("lookup"):
            found = store.lookup(address)
        if isinstance(found, Hit):
            served = self._from_entry(backend, store, guard, address, found, "hit", ())
            if isinstance(served, CompiledModel):
                return served
            found = served
        missed = self._count_miss(found)
        if self._settings.on_miss == "fail":
            raise MissError(
                f"no entry for {self._request.source.name} with backend {backend.name} (key {key.digest}) in "
                f"{store.root}, and on_miss is 'fail'; missed: {', '.join(missed) or 'everything'}. Build it where "
                "on_miss is 'compile' with the same archive, device and toolchain"
            )
        if self._settings.on_miss == "eager":
            return self._try(get_backend("eager"))
        if self._settings.on_miss == "background":
            return self._serve_eagerly_meanwhile(backend, store, address, missed)
        return self._build(backend, store, guard, address, missed)

    def _count_miss(self, found: Miss | Corrupt) -> tuple[str, ...]:
        self._metrics.count("miss")
        if isinstance(found, Corrupt):
            self._metrics.count("corrupt")
            self._notes.append(f"damaged entry: {found.reason}")
            return ("corrupt",)
        return found.parts

    def _open_store(self) -> Store:
        if self._store is None:
            self._store, problem = open_store(self._settings, self._metrics)
            if problem is not None:
                self._metrics.count("fallback")
                self._fallbacks.append({"backend": "store", "reason": problem})
        return self._store

    def _build(
        self, backend: Backend, store: Store, guard: Guard, address: Address, missed: tuple[str, ...]
    ) -> CompiledModel:
        self.estimate = estimate = store.build_estimate(address)
        with contextlib.ExitStack() as stack:
            with self._metrics.phase("wait"):
                lease = stack.enter_context(store.lease(address, estimate))
            found = store.lookup(address)  # somebody may have published while this process waited
            if isinstance(found, Hit):
                served = self._from_entry(backend, store, guard, address, found, "waited", missed)
                if isinstance(served, CompiledModel):
                    return served
                missed = self._count_miss(served)
            self._refuse(guard)
            expected = f", about {estimate:.0f} s" if estimate else ""
            logger.info("%s: building with %s%s", self._request.source.name, backend.name, expected)
            lease.report(phase="build")
            self._request.shared_folder = store.root / "shared"
            with store.staging(address) as staging:
                with self._metrics.phase("build"), guard.marked("build"):
                    built = backend.build(self._request, staging, self._metrics.build_phase)
                self._metrics.count("build")
                manifest = self._manifest(backend, address.key, built.description, staging)
                # Only what has loaded and answered rightly is published.
                lease.report(phase="load")
                loaded, canary = self._load(backend, store, guard, address, staging, manifest, "", built.loaded)
                lease.report(phase="publish")
                directory = staging
                with self._metrics.phase("publish"):
                    try:
                        directory = store.publish(address, staging, manifest)
                    except StoreError as error:
                        logger.warning("%s; serving it unpublished", error)
                        self._metrics.count("publish_failed")
                        self._notes.append(_one_line(error))
                if built.loaded is None and directory != staging:
                    # What was loaded may open further files of its directory later, and that has moved.
                    del loaded
                    manifest = read_manifest(directory)  # another process may have published the same key first
                    loaded, _ = self._load(backend, store, guard, address, directory, manifest, manifest.seal, None)
                return self._ready(backend, loaded, address.key.digest, "built", missed, canary)

    def _serve_eagerly_meanwhile(
        self, backend: Backend, store: Store, address: Address, missed: tuple[str, ...]
    ) -> CompiledModel:
        """Serve eagerly while a child process builds, and then what it has built."""
        from ts_handlers.background import BackgroundBuild

        def load(built: str) -> CompiledModel:
            """An ordinary start from the entry that is there now, and nothing else.

            Without limits, which hold for the whole process and would end or fail requests: the child has loaded and
            checked the artifact under them.
            """
            settings = msgspec.structs.replace(
                self._settings,
                backends=(built,),
                on_miss="fail",
                strict=True,
                guard=GuardSettings(load_seconds=None),
            )
            start = _Start(Request(self._request.source, settings, self._request.device), Metrics())
            start._store = store
            return start.run()

        model = self._try(get_backend("eager"))
        model.outcome = dataclasses.replace(model.outcome, result="background", missed=missed)
        model.background = BackgroundBuild(model, self._request, backend, store, address, load)
        model.background.begin()
        return model

    def _manifest(self, backend: Backend, key: CacheKey, artifact: dict[str, object], staging: Path) -> Manifest:
        recorded = {
            "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "host": platform.node(),
            "kernel": platform.release(),
            "package": ts_handlers.__version__,
            "compiler": fingerprint.compiler_identity(),
            "python": fingerprint.python_identity(),
        }
        build_ms = {name: round(value, 1) for name, value in self._metrics.build_ms.items()}
        # Through JSON once, so that a builder uses the very description that a later reader will.
        plain = json.loads(json.dumps(artifact))
        return Manifest(key["format"], key.parts, backend.name, plain, list_files(staging), recorded, build_ms)

    def _refuse(self, guard: Guard, seal: str = "") -> None:
        try:
            guard.refuse(seal)
        except QuarantinedError:
            self._metrics.count("quarantined")
            raise

    def _from_entry(
        self,
        backend: Backend,
        store: Store,
        guard: Guard,
        address: Address,
        hit: Hit,
        result: str,
        missed: tuple[str, ...],
    ) -> CompiledModel | Corrupt:
        """Serve an entry; one that does not load although its bytes are right is moved aside, to be built again."""
        self._refuse(guard, hit.manifest.seal)
        try:
            with collection_paused():
                loaded, canary = self._load(
                    backend, store, guard, address, hit.directory, hit.manifest, hit.manifest.seal, None
                )
        except _FINAL:
            raise
        except Exception as error:
            if not _is_damage(error):
                raise
            store.discard(address, f"{type(error).__name__}: {_one_line(error)}")
            return Corrupt(_one_line(error))
        self._metrics.count("hit")
        return self._ready(backend, loaded, address.key.digest, result, missed, canary)

    def _load(
        self,
        backend: Backend,
        store: Store,
        guard: Guard,
        address: Address,
        directory: Path,
        manifest: Manifest,
        seal: str,
        live: Loaded | None,
    ) -> tuple[Loaded, dict[str, object]]:
        """Load an artifact unless it is live already, check and warm it up, all of it guarded.

        `seal` is what a quarantine names: the entry, or nothing while it is not published.
        """
        loaded = live
        with guard.marked("load", seal, sum(manifest.build_ms.values()) / 1000):
            if guard.problem is not None and guard.problem not in self._notes:
                self._notes.append(guard.problem)
            if loaded is None:
                with self._metrics.phase("load"), guard.limited():
                    loaded = backend.load(self._request, directory, manifest.artifact)
            loaded = self._slots.wrap(loaded)
            limited = guard.limit(loaded)
            with self._metrics.phase("canary"):
                try:
                    canary = check_canary(store, address, self._request, limited)
                except CanaryError as error:
                    guard.quarantine_canary(seal, error)
                    raise
            with self._metrics.phase("warmup"):
                run_warmup(self._request, limited, canary["cases"])
        if canary["source"] == "eager":
            self._metrics.count("canary_recorded")
        loaded.seal()
        return loaded, canary

    def _ready(
        self,
        backend: Backend,
        loaded: Loaded,
        key: str | None,
        result: str,
        missed: tuple[str, ...],
        canary: dict[str, object] | None = None,
    ) -> CompiledModel:
        outcome = Outcome(
            backend=backend.name,
            key=key,
            result=result,
            missed=missed,
            fallbacks=tuple(self._fallbacks),
            canary=canary,
            notes=(*self._notes, *(self._store.notes if self._store is not None else ())),
        )
        if backend.name in ("aot_inductor", "tensorrt"):
            self._request.source.release()  # the artifact does not need the eager module
        loaded = self._slots.wrap(loaded)
        model = CompiledModel(self._request, loaded, outcome, self._metrics, self._slots)
        model.store = self._store  # keeps the entry from being evicted while the model is served
        return model


def _is_damage(error: Exception) -> bool:
    """Whether an error while loading a verified entry says that the entry is at fault, not the model or the weights."""
    return not isinstance(error, (CanaryError, MemoryError, RefitError))


def _one_line(error: BaseException) -> str:
    return re.sub(r"\s+", " ", str(error)).strip()[:400]


def log_outcome(event: str, name: str, model: CompiledModel) -> None:
    """Log what a model has become as one structured line."""
    facts = model.describe()
    wanted = ("backend", "key", "result", "missed", "fallbacks", "phases_ms")
    logger.info("ts_handlers %s %s", event, json.dumps({"model": name, **{key: facts[key] for key in wanted}}))

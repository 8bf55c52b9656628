"""``on_miss: background``: serve eagerly while a child process builds, then swap between two requests.

The worker is READY as soon as the eager model is. A thread of it then

1. takes a lease on this key for this host; if another process holds it, waits, and takes over when that dies;
2. runs one child process (`ts_handlers.startup.build_process`), which tries the backends in the fallback order and
   publishes what it has built;
3. loads the published entry as an ordinary start does, canary and warm-up included, while eager keeps serving; each
   step of native code begins between two requests, see `ts_handlers.startup.background.idle_window`;
4. replaces what the model runs by one assignment.

A native artifact is loaded by the child first: one that kills its process kills the child, and the worker stays eager.
Whatever fails is logged, counted and described, and changes nothing.

Files in ``<store>/leases``: ``<key>.background.lock`` and ``.json`` as of `ts_handlers.store.local.lease`, and
``<key>.background.outcome``, the JSON object with which the latest build of this host ended::

    {"time": seconds since the epoch, "backend": name or null, "reason": text or null, "fallbacks": [...]}
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import json
import logging
import os
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any

import msgspec
import torch

from ts_handlers.backends import get_backend
from ts_handlers.backends.base import Backend, Target
from ts_handlers.compiled_model import CompiledModel, log_outcome
from ts_handlers.errors import UNDECODABLE, BuildError, one_line
from ts_handlers.guard.judgement import remember_crash
from ts_handlers.startup.address import key_in_store, known_names
from ts_handlers.startup.background.idle_window import IdleWindows, wait_for_idle_window
from ts_handlers.startup.build_process import BuildProcess
from ts_handlers.store.address import Address
from ts_handlers.store.base import Hit, Store
from ts_handlers.store.local.layout import BACKGROUND, LEASES, OUTCOME
from ts_handlers.store.local.lease import hold_lease, read_status
from ts_handlers.system.files import write_atomically

logger = logging.getLogger(__name__)

LOAD_SECONDS_AT_EXIT = 10.0
FROM_THE_CHILD = (
    "build",
    "build_failed",
    "build_skipped",
    "fallback",
    "canary_recorded",
    "publish_failed",
    "corrupt",
    "evicted",
)
"""Counters of the build process that count as this one's."""


@dataclasses.dataclass
class Ended:
    """How a build ended: the backend whose artifact was published, or why there is none."""

    backend: str | None
    reason: str | None = None
    fallbacks: list[dict[str, str]] = dataclasses.field(default_factory=list)


class BackgroundBuild:
    """The build that goes on beside an eager model, and the swap.

    Parameters
    ----------
    model:
        Serves eagerly; gets what was built.
    target, backend, store, address:
        What was missed.
    load:
        Loads the published entry of a backend, with canary and warm-up; the second argument says when native code may
        run.
    retry_failed:
        See `ts_handlers.start.start_model`.
    published:
        Called on the background thread when the store has the entry; what it raises keeps the eager model.
    """

    def __init__(
        self,
        model: CompiledModel,
        target: Target,
        backend: Backend,
        store: Store,
        address: Address,
        load: Callable[[str, IdleWindows], CompiledModel],
        retry_failed: bool = False,
        published: Callable[[], None] = lambda: None,
    ) -> None:
        self._model = model
        self._target = target
        self._backend = backend
        self._store = store
        self._address = address
        self._load = load
        self._retry_failed = retry_failed
        self._published = published
        self._leases = store.state_directory / LEASES
        self._name = f"{address.key.digest}{BACKGROUND}"
        self._state = "waiting"
        self._phase: str | None = None
        self._reason: str | None = None
        self._estimate = store.build_estimate(address)
        self._began = time.time()
        self._load_began: float | None = None
        self._ended: float | None = None
        self._process: BuildProcess | None = None
        self._eager_module: weakref.ref[torch.nn.Module] | None = None
        self._eager_pool = model.pool
        self._phases_ms: dict[str, float] = {}
        self._closed = False
        self._callbacks: list[Callable[[], None]] = []
        self._lock = threading.Lock()
        self._done = threading.Event()
        # State of torch that belongs to the starting thread.
        self._device = target.device
        if self._device.type == "cuda" and self._device.index is None:
            self._device = torch.device("cuda", torch.cuda.current_device())
        self._threads = torch.get_num_threads()

    def begin(self) -> None:
        """Start the thread that does everything; returns at once."""
        atexit.register(self.close)
        threading.Thread(target=self._run, daemon=True, name="ts_handlers-background").start()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait for the swap or the failure; False when that took longer than `timeout` seconds."""
        return self._done.wait(timeout)

    def when_done(self, callback: Callable[[], None]) -> None:
        """Call `callback` after the swap or the failure: on the background thread, or now when it is over."""
        with self._lock:
            if not self._done.is_set():
                self._callbacks.append(callback)
                return
        callback()

    @property
    def left_module(self) -> bool:
        """Whether the eager module was to go with the swap and is still there: reference cycles hold it."""
        return self._eager_module is not None and self._eager_module() is not None

    def wait_for_idle_window(self) -> None:
        """Return when no call of the model is under way; at once when it is to be closed."""
        wait_for_idle_window(self._calls, lambda: self._closed)

    def _calls(self) -> tuple[bool, int]:
        """Whether a call is under way, on what serves now or on the eager model, and how many there have been."""
        pools = {id(pool): pool.stats() for pool in (self._eager_pool, self._model.pool)}.values()
        busy = self._model.answering > 0 or any(pool.in_use or pool.waiting for pool in pools)
        return busy, sum(pool.lent for pool in pools)

    def close(self) -> None:
        """Give up: end the child process and never swap."""
        self._closed = True
        process = self._process
        if process is not None:
            process.end("the server stops")
        if self._state == "loading":  # native code must not run while the interpreter goes away
            self._done.wait(LOAD_SECONDS_AT_EXIT)

    def describe(self) -> dict[str, Any]:
        """State, phase, seconds and reason, JSON-compatible.

        `state` is ``waiting`` (another process of this host builds), ``building``, ``loading``, ``swapped`` or
        ``failed``; `began` and `load_began` are in seconds since the epoch, `estimate_s` what the latest build of this
        model took, None when there was none.
        """
        state, phase, process = self._state, self._phase, self._process
        pid = None if process is None or self._ended is not None else process.pid
        if state == "waiting":
            holder = read_status(self._leases, self._name)
            pid, phase = holder.get("pid"), holder.get("phase")
        return {
            "state": state,
            "phase": phase,
            "pid": pid,
            "began": round(self._began, 3),
            "load_began": None if self._load_began is None else round(self._load_began, 3),
            "elapsed_s": round((self._ended or time.time()) - self._began, 3),
            "estimate_s": None if self._estimate is None else round(self._estimate, 1),
            "reason": self._reason,
            "phases_ms": {name: round(value, 1) for name, value in self._phases_ms.items()},
        }

    def _run(self) -> None:
        try:
            if self._device.type == "cuda":
                torch.cuda.set_device(self._device)
            ended = self._obtain()
            if ended.backend is None:
                raise BuildError(ended.reason or "nothing was built")
            self._published()
            self._swap(ended.backend, ended.fallbacks)
        except Exception as error:
            self._reason = one_line(f"{type(error).__name__}: {error}", 1000)
            self._model.metrics.count("background_failed")
            logger.warning("%s: stays eager: %s", self._target.source.name, self._reason)
            logger.debug("details", exc_info=error)
            self._state = "failed"
        finally:
            self._ended = time.time()
            self._phase = None
            metrics = self._model.metrics
            if metrics.recorder is not None:
                metrics.recorder.ended_beside(self._model.outcome, self.describe(), metrics.build_ms)
            atexit.unregister(self.close)
            with self._lock:
                self._done.set()
            for callback in self._callbacks:
                callback()

    def _obtain(self) -> Ended:
        """Build, or wait for the process of this host that does; raises or tells why there is no artifact."""
        recipe = self._target.source.recipe()
        if recipe is None:
            raise BuildError(
                "no other process can make this model: it exists in this process only, or its handler class is local; "
                "start it from an archive (ArchiveSource), or set on_miss: compile"
            )
        if not os.access(self._store.state_directory, os.W_OK | os.X_OK):
            raise BuildError(
                f"the store {self._store.name} cannot be written, so what a child process builds would be lost; make "
                "it writable, or fill it beforehand"
            )
        with hold_lease(self._leases, self._name, self._estimate) as lease:
            ended = self._read_outcome()
            if ended is not None:  # another process has tried while this one waited
                return ended
            if isinstance(self._store.lookup(self._address), Hit):
                return Ended(self._backend.name)
            self._state = "building"

            def report(phase: str, estimate: float | None) -> None:
                self._phase = phase
                self._estimate = estimate if estimate is not None else self._estimate
                lease.report(phase=phase)
                if self._model.metrics.recorder is not None:
                    self._model.metrics.recorder.builds_beside(phase, self._estimate)

            try:
                ended = self._build(dict(recipe), report)
            except BuildError as error:
                ended = Ended(None, str(error))
                if self._process is not None and not self._closed:
                    remember_crash(self._store.state_directory, self._process.pid, str(error), self._target.settings)
            if not self._closed:
                self._write_outcome(ended)
            return ended

    def _build(self, recipe: dict[str, Any], report: Callable[[str, float | None], None]) -> Ended:
        settings = self._target.settings
        # The child's start goes the same way as this one, also to a substitute of the backend.
        key = key_in_store(get_backend(self._backend.name), self._target, self._store)
        names = known_names(self._store, self._target, key)
        spec = {
            "source": recipe,
            "settings": msgspec.to_builtins(settings),
            "overrides": {
                "on_miss": "compile",
                "store": str(self._store.state_directory),
                "backends": self._remaining(),
            },
            "device": str(self._device),
            "threads": self._threads,
            "float32_matmul": torch.get_float32_matmul_precision(),
            "retry_failed": self._retry_failed,
            "environment": self._target.source.surroundings.variables(names),
            "keys": {self._backend.name: key.parts},
        }
        report("process", None)
        self._process = BuildProcess(self._target.source.name, spec, settings.background, report)
        self._model.metrics.count("background_build")
        if self._closed:
            self._process.end("the server stops")
        result = self._process.run()
        metrics = self._model.metrics
        for name in FROM_THE_CHILD:
            metrics.count(name, result["counters"].get(name, 0))
        metrics.build_ms.update(result["build_ms"])
        if not get_backend(result["backend"]).persistent:
            reasons = "; ".join(f"{each['backend']}: {each['reason']}" for each in result["fallbacks"])
            return Ended(None, f"no backend works: {reasons}", result["fallbacks"])
        if result["counters"].get("publish_failed"):
            return Ended(None, f"built but not published: {'; '.join(result['notes'])}", result["fallbacks"])
        return Ended(result["backend"], None, result["fallbacks"])

    def _remaining(self) -> tuple[str, ...]:
        """The fallback order from the missed backend on; those before it have failed already."""
        backends = self._target.settings.backends
        return backends[backends.index(self._backend.name) :]

    def _swap(self, backend: str, fallbacks: list[dict[str, str]]) -> None:
        if self._closed:
            raise BuildError("the server stops")
        self._phase = None
        self._load_began = time.time()
        self._state = "loading"
        model = self._model
        eager = weakref.ref(self._target.source.eager())
        self.wait_for_idle_window()
        fresh = self._load(backend, IdleWindows(self.wait_for_idle_window))
        self._phases_ms = fresh.metrics.phases_ms
        fresh.outcome = dataclasses.replace(
            fresh.outcome,
            result="swapped",
            missed=model.outcome.missed,
            fallbacks=(*model.outcome.fallbacks, *fallbacks, *fresh.outcome.fallbacks),
            notes=(*model.outcome.notes, *fresh.outcome.notes),
        )
        model.swap(fresh)
        if not get_backend(backend).needs_eager_module and self._target.settings.outside != "eager":
            self._eager_module = eager
        model.metrics.count("swap")
        self._state = "swapped"
        log_outcome("swap", self._target.source.name, model)

    def _read_outcome(self) -> Ended | None:
        """How a build ended that another process finished after this one had missed."""
        try:
            facts = json.loads((self._leases / f"{self._name}{OUTCOME}").read_text("utf-8"))
            if float(facts.pop("time")) < self._began:
                return None
            return Ended(**facts)
        except (OSError, KeyError, TypeError, OverflowError, *UNDECODABLE):
            return None

    def _write_outcome(self, ended: Ended) -> None:
        facts = {"time": time.time(), **dataclasses.asdict(ended)}
        with contextlib.suppress(OSError):
            write_atomically(self._leases / f"{self._name}{OUTCOME}", json.dumps(facts))

"""One backend's turn in a start: find its entry, or build it, and check what is to be served.

Native code runs under the crash guard, see `ts_handlers.store.guard`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import ts_handlers
from ts_handlers import fingerprint
from ts_handlers.backends.base import Backend, Loaded, Request
from ts_handlers.cycle_collector import collection_paused
from ts_handlers.errors import (
    FINAL,
    BuildError,
    CanaryError,
    FailedBeforeError,
    QuarantinedError,
    RefitError,
    StoreError,
    one_line,
)
from ts_handlers.locked_directory import empty_folder
from ts_handlers.metrics import Metrics
from ts_handlers.serving.slots import ModuleSlots
from ts_handlers.store.base import Address, Corrupt, Hit, Miss, Store
from ts_handlers.store.entry import Manifest, list_files, read_manifest
from ts_handlers.store.guard import Guard
from ts_handlers.store.lease import Lease
from ts_handlers.warmup import check_canary, idle_processors, run_warmup

logger = logging.getLogger(__name__)

IDLE_SECONDS = 30.0
"""How long a load beside a model that serves may keep to idle processors."""


@dataclasses.dataclass(frozen=True)
class Served:
    """An artifact that has loaded and answered rightly; `result` is as of `ts_handlers.compiled_model.Outcome`."""

    loaded: Loaded
    result: str
    canary: dict[str, object] | None


@dataclasses.dataclass
class _Made:
    """A build that has loaded; `live` when the backend handed over what it had in memory. Nobody else holds `loaded`,
    so that two artifacts are never in memory at once."""

    manifest: Manifest
    loaded: Loaded
    canary: dict[str, object]
    live: bool


class Attempt:
    """A backend, the key that it gives, and what has become of them so far.

    Parameters
    ----------
    notes:
        Gets what `describe` shall say.
    anew_since:
        See `ts_handlers.store.guard.Guard`.
    turn:
        Returns when a step of the artifact's native code may begin: loading, and each run. None when nothing is served
        meanwhile.

    Attributes
    ----------
    missed:
        The key parts that kept the nearest entry from being a hit.
    """

    def __init__(
        self,
        request: Request,
        metrics: Metrics,
        slots: ModuleSlots,
        backend: Backend,
        store: Store,
        address: Address,
        notes: list[str],
        anew_since: float | None,
        turn: Callable[[], None] | None = None,
    ) -> None:
        self.missed: tuple[str, ...] = ()
        self._notes = notes
        self._request = request
        self._metrics = metrics
        self._slots = slots
        self._backend = backend
        self._store = store
        self._address = address
        self._turn = turn
        digest = request.source.weights_digest
        self._guard = Guard(store.root, request.settings, address.key, address.model, digest, anew_since)

    def find(self) -> Served | None:
        """Serve the entry that is there; one that does not load although its bytes are right is moved aside.

        Raises
        ------
        QuarantinedError
            The entry is quarantined.
        """
        with self._metrics.phase("lookup"):
            found = self._store.lookup(self._address)
        return self._serve(found, "hit")

    def _serve(self, found: Hit | Miss | Corrupt, result: str) -> Served | None:
        served = self._from_entry(found, result) if isinstance(found, Hit) else found
        if isinstance(served, Served):
            return served
        self._metrics.count("miss")
        if isinstance(served, Corrupt):
            self._metrics.count("corrupt")
            self._notes.append(f"damaged entry: {served.reason}")
            self.missed = ("corrupt",)
        else:
            self.missed = served.parts
        return None

    def _from_entry(self, hit: Hit, result: str) -> Served | Corrupt:
        seal = hit.manifest.seal
        self._refuse(seal)
        try:
            # Beside a model that serves the collector goes on, for what its requests leave behind.
            with collection_paused() if self._turn is None else contextlib.nullcontext():
                loaded, canary = self._load(hit.directory, hit.manifest, seal, None)
        except FINAL:
            raise
        except Exception as error:
            if not _is_damage(error):
                raise
            self._store.discard(self._address, f"{type(error).__name__}: {one_line(error)}")
            return Corrupt(one_line(error))
        self._metrics.count("hit")
        return Served(loaded, result, canary)

    def refuse_build(self) -> None:
        """Raise `QuarantinedError` or `FailedBeforeError` when this key is not to be built now."""
        self._refuse("")

    def _refuse(self, seal: str) -> None:
        try:
            self._guard.refuse(seal)
        except QuarantinedError:
            self._metrics.count("quarantined")
            raise
        except FailedBeforeError:
            self._metrics.count("build_skipped")
            raise

    def build(self, estimate: float | None) -> Served:
        """Build and publish, or serve what another process has published while this one waited for its turn.

        Parameters
        ----------
        estimate:
            Seconds that it took the last time, None when unknown.
        """
        with contextlib.ExitStack() as stack:
            with self._metrics.phase("wait"):
                lease = stack.enter_context(self._store.lease(self._address, estimate))
            found = self._store.lookup(self._address)  # somebody may have published while this process waited
            if isinstance(found, Hit):
                served = self._serve(found, "waited")
                if served is not None:
                    return served
            self.refuse_build()
            expected = f", about {estimate:.0f} s" if estimate else ""
            logger.info("%s: building with %s%s", self._request.source.name, self._backend.name, expected)
            self._request.shared_folder = self._store.root / "shared"
            with self._store.staging(self._address) as staging:
                return self._publish(lease, staging, self._make(lease, staging))

    def _make(self, lease: Lease, staging: Path) -> _Made:
        """Build into `staging`, load and check; a failure is remembered for later starts."""
        try:
            with self._guard.remembered():
                try:
                    return self._compile(lease, staging)
                except Exception as error:
                    from ts_handlers.store.failures import is_disk_full

                    if not is_disk_full(error):
                        raise
                    self._make_room(staging, error)
                self._request.source.release()
                return self._compile(lease, staging)
        except Exception:
            self._metrics.count("build_failed")
            raise

    def _compile(self, lease: Lease, staging: Path) -> _Made:
        self._request.check_source()
        lease.report(phase="build")
        with self._metrics.phase("build"), self._guard.marked("build"):
            built = self._backend.build(self._request, staging, self._metrics.build_phase)
        self._metrics.count("build")
        manifest = self._manifest(built.description, staging)
        lease.report(phase="load")
        loaded, canary = self._load(staging, manifest, "", built.loaded)
        return _Made(manifest, loaded, canary, live=built.loaded is not None)

    def _make_room(self, staging: Path, error: Exception) -> None:
        """Tidy the store if it lies on the disk that is full.

        Raises
        ------
        BuildError
            Nothing came of it; with the folders, their free bytes and the remedy.
        """
        from ts_handlers.store.eviction import Limits
        from ts_handlers.store.space import make_room

        empty_folder(staging)
        root = self._store.root
        folders = [staging.parent, Path(tempfile.gettempdir())]
        free = {folder: shutil.disk_usage(folder).free for folder in folders}  # what the build had
        full = min(folders, key=free.__getitem__)
        if os.stat(full).st_dev == os.stat(root).st_dev:
            space = self._request.settings.space
            report = make_room(root, Limits.of(space.store), Limits.of(space.per_model))
            self._metrics.count("evicted", report.evicted)
            if report.freed_bytes > 0:
                logger.info("%s: freed %d bytes in %s, building again", self._address.model, report.freed_bytes, root)
                return
        found = ", ".join(f"{count} bytes in {folder}" for folder, count in free.items())
        raise BuildError(
            f"no space left: the build had {found}; free some, evict entries with `ts-handlers gc --max-bytes SIZE`, "
            f"or move the store (TS_HANDLERS_CACHE) or the temporary folder (TMPDIR); {one_line(error)}"
        ) from error

    def _publish(self, lease: Lease, staging: Path, made: _Made) -> Served:
        """Publish what has loaded and answered rightly."""
        lease.report(phase="publish")
        directory = staging
        with self._metrics.phase("publish"):
            try:
                directory = self._store.publish(self._address, staging, made.manifest)
            except StoreError as error:
                logger.warning("%s; serving it unpublished", error)
                self._metrics.count("publish_failed")
                self._notes.append(one_line(error))
        if directory != staging and not made.live:
            # What was loaded may open further files of its directory later, and that has moved.
            del made.loaded
            manifest = read_manifest(directory)  # another process may have published the same key first
            made.loaded, _ = self._load(directory, manifest, manifest.seal, None)
        return Served(made.loaded, "built", made.canary)

    def _manifest(self, artifact: dict[str, object], staging: Path) -> Manifest:
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
        key = self._address.key
        return Manifest(key["format"], key.parts, self._backend.name, plain, list_files(staging), recorded, build_ms)

    def _load(
        self, directory: Path, manifest: Manifest, seal: str, live: Loaded | None
    ) -> tuple[Loaded, dict[str, object]]:
        """Load an artifact unless it is live already, check and warm it up, all of it guarded.

        `seal` is what a quarantine names: the entry, or nothing while it is not published.
        """
        loaded = live
        guard = self._guard
        with guard.marked("load", seal, sum(manifest.build_ms.values()) / 1000):
            if guard.problem is not None and guard.problem not in self._notes:
                self._notes.append(guard.problem)
            if loaded is None:
                if self._turn is not None:
                    self._turn()
                with self._metrics.phase("load"), guard.limited():
                    loaded = self._backend.load(self._request, directory, manifest.artifact)
            if self._request.signature is not None:  # an entry knows no limits, and the values of its builder
                loaded.signature = loaded.signature.with_values_of(self._request.signature)
            loaded = self._slots.wrap(loaded)
            limited = guard.limit(loaded) if self._turn is None else _take_turns(loaded, self._turn)
            with self._metrics.phase("canary"):
                try:
                    canary = check_canary(self._store, self._address, self._request, limited)
                except CanaryError as error:
                    guard.quarantine_canary(seal, error)
                    raise
            with self._metrics.phase("warmup"):
                run_warmup(self._request, limited, canary["cases"])
        if canary["source"] == "eager":
            self._metrics.count("canary_recorded")
        loaded.seal()
        return loaded, canary


def _take_turns(loaded: Loaded, turn: Callable[[], None]) -> Loaded:
    """The same artifact, each of its runs when it may begin, and if possible on processors that requests do not use.

    With as many threads as a request has: the calls that are under way when a run begins are over soon. Where no
    processor is idle, or after `IDLE_SECONDS`, a run is an ordinary one.
    """
    from ts_handlers.serving.idle_priority import keeps_threads, run_at_idle_priority

    deadline = time.monotonic() + IDLE_SECONDS
    idle = loaded.frees_interpreter and not keeps_threads()

    def run(tensors: list[torch.Tensor]) -> Any:
        turn()
        if idle and idle_processors() > 0 and time.monotonic() < deadline:
            return run_at_idle_priority(loaded.run, tensors)
        return loaded.run(tensors)

    return dataclasses.replace(loaded, run=run, adjusts_threads=False)


def _is_damage(error: Exception) -> bool:
    """Whether an error while loading a verified entry says that the entry is at fault, not the model or the weights."""
    return not isinstance(error, (CanaryError, MemoryError, RefitError))

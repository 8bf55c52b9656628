"""Loading an artifact for service: load, compare with eager, warm up, all of it under the crash guard."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ts_handlers.backends.base import Backend
from ts_handlers.errors import CanaryError
from ts_handlers.execution.base import Loaded
from ts_handlers.guard.guard import Guard
from ts_handlers.startup.base import Start
from ts_handlers.startup.canary import check_canary
from ts_handlers.startup.preparation import Prepared, prepare
from ts_handlers.startup.warmup import run_warmup
from ts_handlers.store.address import Address
from ts_handlers.store.entry import Manifest


class Loader:
    """Loads the artifacts of one key.

    Parameters
    ----------
    start, backend, address:
        As of `ts_handlers.startup.attempt.Attempt`.
    guard:
        What watches over its native code.
    """

    def __init__(self, start: Start, backend: Backend, address: Address, guard: Guard) -> None:
        self._start = start
        self._backend = backend
        self._address = address
        self._guard = guard

    def load(
        self, directory: Path, manifest: Manifest, digest: str = "", live: Loaded | None = None
    ) -> tuple[Loaded, dict[str, Any]]:
        """Load an artifact, check it against eager and warm it up.

        Parameters
        ----------
        directory, manifest:
            Its files and what is known of them.
        digest:
            What a quarantine names: the entry, or nothing while it is not published.
        live:
            The artifact, if the backend has it in memory already.

        Returns
        -------
        The artifact as requests run it, and what `ts_handlers.startup.canary.check_canary` says of it.

        Raises
        ------
        CanaryError
            It answers otherwise than eager.
        """
        metrics, target, guard = self._start.metrics, self._start.target, self._guard
        with guard.marked("load", digest, sum(manifest.build_ms.values()) / 1000):
            if guard.problem is not None and guard.problem not in self._start.notes:
                self._start.notes.append(guard.problem)
            prepared = self._prepare(self._open(directory, manifest) if live is None else live)
            canary = self._check(prepared, digest)
            with metrics.phase("warmup"):
                run_warmup(target, prepared.checked, canary["cases"])
        if canary["source"] == "eager":
            metrics.count("canary_recorded")
        prepared.served.end_warmup()
        return prepared.served, canary

    def _open(self, directory: Path, manifest: Manifest) -> Loaded:
        if self._start.windows is not None:
            self._start.windows.before_run()
        with self._start.metrics.phase("load"), self._guard.limited():
            return self._backend.load(self._start.target, directory, manifest.artifact)

    def _prepare(self, loaded: Loaded) -> Prepared:
        """Its runs before READY go under the guard's limits, or wait for idle windows of the model that serves."""
        declared, slots, windows = self._start.target.signature, self._start.slots, self._start.windows
        if windows is None:
            return prepare(loaded, declared, slots, self._guard.limit)
        return prepare(loaded, declared, slots, windows.around(loaded.frees_interpreter), yields=True)

    def _check(self, prepared: Prepared, digest: str) -> dict[str, Any]:
        with self._start.metrics.phase("canary"):
            try:
                start = self._start
                return check_canary(
                    start.store, self._address, start.target, prepared.checked, start.notes, thorough=not digest
                )
            except CanaryError as error:
                self._guard.quarantine_canary(digest, error)
                raise

"""Everything the exporter tells of one store: what processes have recorded, and what lies in the store."""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ts_handlers.guard.quarantine import read_quarantines
from ts_handlers.guard.state_directory import existing_directories
from ts_handlers.monitoring.gathering import Gathered, gather
from ts_handlers.monitoring.process_file import Key
from ts_handlers.monitoring.progress import STATES, shown
from ts_handlers.monitoring.recorder import folder_of
from ts_handlers.store.upkeep.scan import scan_entries
from ts_handlers.version import __version__

STORE_SECONDS = 15.0
"""How old the sizes of the store may be: a scan reads every manifest."""
_ORDER = ("ready", "compiling", "waiting", "starting", "failed")


class Collector:
    """Looks at a store whenever it is asked.

    Parameters
    ----------
    root:
        Root of the store; it need not exist yet.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._store: dict[Key, list[float]] = {}
        self._looked: float | None = None

    def series(self) -> dict[Key, list[float]]:
        """The numbers of every metric."""
        gathered = self._gather()
        models = progress_of(gathered)
        found = {
            **gathered.series,
            **self._of_store(),
            ("exporter_info", (__version__,)): [1.0],
        }
        for model, facts in models.items():
            found["model_ready", (model,)] = [float(facts["serving"])]
            for state in STATES:
                count = sum(each["state"] == state for each in facts["workers"])
                found["workers", (model, state)] = [float(count)]
        found.setdefault(("series_dropped_total", ()), [0.0])
        return found

    def progress(self) -> dict[str, dict[str, Any]]:
        """How far the start of each model has got, see `progress_of`."""
        return progress_of(self._gather())

    def _gather(self) -> Gathered:
        return gather(folder_of(directory) for directory in existing_directories(self._root))

    def _of_store(self) -> Mapping[Key, list[float]]:
        if self._looked is not None and time.monotonic() - self._looked < STORE_SECONDS:
            return self._store
        found: dict[str, float] = {"store_bytes": 0, "store_entries": 0, "store_damaged_entries": 0}
        with contextlib.suppress(OSError):
            entries = scan_entries(self._root)
            found["store_bytes"] = sum(entry.bytes for entry in entries)
            found["store_entries"] = len(entries)
            found["store_damaged_entries"] = sum(entry.problem is not None for entry in entries)
        with contextlib.suppress(OSError):
            found["store_free_bytes"] = shutil.disk_usage(_existing(self._root)).free
        found["store_quarantined"] = len(read_quarantines(self._root))
        self._store = {(name, ()): [float(value)] for name, value in found.items()}
        self._looked = time.monotonic()
        return self._store


def progress_of(gathered: Gathered, now: float | None = None) -> dict[str, dict[str, Any]]:
    """For each model its state, phase, seconds, estimate and share, and the same of each process as ``workers``.

    A model is ``ready`` once a process serves it with nothing going on; otherwise the state is that of the process that
    has got furthest. A model that no living process starts is ``failed`` if its latest process has not got it ready.
    """
    found = {}
    for model, processes in sorted(gathered.progress.items()):
        workers = [shown(facts, now) for facts in processes]
        best = min(workers, key=lambda each: (not each["serving"], _rank(each["state"])))
        found[model] = {**best, "serving": any(each["serving"] for each in workers), "workers": workers}
    for model, facts in sorted(gathered.ended.items()):
        if model not in found:
            found[model] = {**shown(facts, now), "serving": False, "workers": []}
    return found


def is_ready(models: Mapping[str, Mapping[str, Any]], asked: Sequence[str] = ()) -> bool:
    """Whether each model is served by a worker at least: those that are asked for, otherwise all, and one at least."""
    names = asked or list(models)
    return bool(names) and all(name in models and models[name]["serving"] for name in names)


def _rank(state: object) -> int:
    return _ORDER.index(state) if state in _ORDER else len(_ORDER)


def _existing(path: Path) -> Path:
    while not path.exists() and path != path.parent:
        path = path.parent
    return path

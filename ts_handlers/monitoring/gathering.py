"""Adds up what the processes of a host have recorded, so that no count is lost or counted twice.

The files of processes that live are read. Those of processes that are gone are added to the totals once, and removed.
`TOTALS` in the same folder holds, as JSON::

    {"series": [[metric, [label values], [numbers]], ...],   of counters and histograms
     "folded": [file name, ...],                             files that are in `series`; those still there are removed
     "ended": {model: progress, ...},                        of the latest process of a model that did not get ready
     "known": {label: [value, ...], ...}}                    label values in the order in which they were first seen

The totals are replaced in one step, with the names of the files that they have just taken in. A process that dies
between that step and the removal leaves files that the next one only removes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ts_handlers.errors import UNDECODABLE
from ts_handlers.monitoring.catalogue import BY_NAME, CAPS, OTHER, Family
from ts_handlers.monitoring.process_file import ENDING, Key, is_over, read_series
from ts_handlers.system.files import lock, write_atomically
from ts_handlers.system.ownership import is_private_folder

logger = logging.getLogger(__name__)

TOTALS = "totals.json"
LOCK = "totals.lock"
UNFINISHED_SECONDS = 60.0


@dataclasses.dataclass
class Gathered:
    """What all processes have recorded.

    Attributes
    ----------
    series:
        Numbers by metric and label values.
    progress:
        For each model what each living process says of its start.
    ended:
        For each model how the latest process ended that did not get it ready.
    """

    series: dict[Key, list[float]] = dataclasses.field(default_factory=dict)
    progress: dict[str, list[dict[str, Any]]] = dataclasses.field(default_factory=dict)
    ended: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    known: dict[str, list[str]] = dataclasses.field(default_factory=dict)

    def take(self, series: Mapping[Key, list[float]], gauges: bool) -> None:
        """Add the series of a process."""
        for (name, labels), numbers in series.items():
            family = BY_NAME.get(name)
            if family is None or len(labels) != len(family.labels) or len(numbers) != family.width:
                continue  # of another version
            if family.type != "gauge" or gauges:
                self._merge(family, self._bounded(family, labels), numbers)

    def _merge(self, family: Family, labels: tuple[str, ...], numbers: list[float]) -> None:
        key = family.name, labels
        before = self.series.get(key)
        if before is None:
            self.series[key] = list(numbers)
        elif family.merge == "max":
            self.series[key] = [max(pair) for pair in zip(before, numbers, strict=True)]
        else:
            self.series[key] = [sum(pair) for pair in zip(before, numbers, strict=True)]

    def _bounded(self, family: Family, labels: tuple[str, ...]) -> tuple[str, ...]:
        found = []
        for label, value in zip(family.labels, labels, strict=True):
            known = self.known.setdefault(label, [])
            if value not in known and value != OTHER:
                if len(known) >= CAPS[label]:
                    value = OTHER
                else:
                    known.append(value)
            found.append(value)
        return tuple(found)

    def end(self, progress: Mapping[str, dict[str, Any]], when: float) -> None:
        """Note what a process that is gone said of its models last."""
        for model, facts in progress.items():
            if facts.get("state") in ("ready", None) or facts.get("serving"):
                continue
            before = self.ended.get(model)
            if before is None or float(before.get("ended") or 0) <= when:
                reason = facts.get("reason") or f"the process ended in the phase {facts.get('phase')}"
                self.ended[model] = {**facts, "state": "failed", "ended": facts.get("ended") or when, "reason": reason}


def gather(folders: Iterable[Path]) -> Gathered:
    """What the processes that record into these folders have recorded.

    Folders that others may write are left out, and so is what cannot be read.
    """
    whole = Gathered()
    for folder in folders:
        if not is_private_folder(folder):
            continue
        with contextlib.suppress(OSError):
            _gather_one(folder, whole)
    return whole


def _gather_one(folder: Path, whole: Gathered) -> None:
    descriptor = _lock_totals(folder)
    try:
        totals, folded = _read_totals(folder)
        names = sorted(name for name in os.listdir(folder) if name.endswith(ENDING) and not name.startswith("."))
        over = []
        for name in names:
            with contextlib.suppress(OSError):
                if name in folded or not is_over(folder / name):
                    continue
                series, progress = read_series(folder / name)
                totals.take(series, gauges=False)
                totals.end(progress, (folder / name).stat().st_mtime)
                over.append(name)
        if descriptor is not None:
            with contextlib.suppress(OSError):
                if over:
                    _write_totals(folder, totals, [*over, *(name for name in names if name in folded)])
                for name in [*over, *folded]:
                    (folder / name).unlink(missing_ok=True)
            _remove_unfinished(folder)
        whole.known = totals.known
        whole.ended.update(totals.ended)
        whole.take(totals.series, gauges=False)
        for name in names:
            if name in over or name in folded:
                continue
            with contextlib.suppress(OSError):
                series, progress = read_series(folder / name)
                whole.take(series, gauges=True)
                for model, facts in progress.items():
                    whole.progress.setdefault(model, []).append(facts)
    finally:
        if descriptor is not None:
            os.close(descriptor)


def _remove_unfinished(folder: Path) -> None:
    """Remove the files of processes that died while they made them."""
    for path in folder.glob(f".*{ENDING}"):
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > UNFINISHED_SECONDS and is_over(path):
                path.unlink()


def _lock_totals(folder: Path) -> int | None:
    """A descriptor that holds the lock of the totals; None where the folder cannot be written."""
    path = folder / LOCK
    while True:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        except OSError:
            return None
        try:
            lock(descriptor, path, wait=True)
        except FileNotFoundError:
            os.close(descriptor)
            continue
        except OSError:
            os.close(descriptor)
            return None
        return descriptor


def _read_totals(folder: Path) -> tuple[Gathered, set[str]]:
    totals = Gathered()
    path = folder / TOTALS
    try:
        facts = json.loads(path.read_text("utf-8"))
        totals.known = {str(label): list(map(str, values)) for label, values in facts["known"].items()}
        totals.ended = dict(facts["ended"])
        series = {(str(n), tuple(map(str, labels))): list(map(float, v)) for n, labels, v in facts["series"]}
        totals.take(series, gauges=False)
        return totals, set(map(str, facts["folded"]))
    except FileNotFoundError:
        pass
    except (OSError, KeyError, TypeError, AttributeError, OverflowError, *UNDECODABLE) as error:
        logger.warning("the totals of the metrics in %s cannot be read (%s); they begin at 0 again", path, error)
        with contextlib.suppress(OSError):
            path.rename(path.with_name(f"{TOTALS}.damaged"))
    return Gathered(), set()


def _write_totals(folder: Path, totals: Gathered, folded: list[str]) -> None:
    facts = {
        "series": [[name, list(labels), numbers] for (name, labels), numbers in totals.series.items()],
        "folded": folded,
        "ended": totals.ended,
        "known": totals.known,
        "time": time.time(),
    }
    write_atomically(folder / TOTALS, json.dumps(facts), mode=0o600, durable=True)

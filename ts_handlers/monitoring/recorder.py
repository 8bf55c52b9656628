"""What a process records of its models: counts, durations and the progress of starts, into its `ProcessFile`.

Nothing is recorded until `begin_recording`, which a server's worker calls. Recording never fails a start or a request:
where the file cannot be made nothing is recorded, with a line in the log.
"""

from __future__ import annotations

import bisect
import logging
import os
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from ts_handlers.errors import one_line
from ts_handlers.guard.state_directory import writable_directories
from ts_handlers.monitoring.catalogue import (
    BY_NAME,
    CAPS,
    FAMILIES,
    OTHER,
    Family,
    metric_of,
    reason_of,
)
from ts_handlers.monitoring.process_file import ENDING, ProcessFile
from ts_handlers.monitoring.progress import Progress
from ts_handlers.system.ownership import is_private_folder
from ts_handlers.system.processes import boot_id

if TYPE_CHECKING:
    from ts_handlers.execution.contexts import PoolStats
    from ts_handlers.execution.outcome import Outcome
    from ts_handlers.metrics import Metrics

logger = logging.getLogger(__name__)

FOLDER = "metrics"
"""In a store's state directory; it has a folder for each boot of each host, as several may share a store."""
SWITCH = "TS_HANDLERS_METRICS"
"""Environment variable: ``off`` records nothing."""
MANY_FILES = 64
"""With more of them in the folder, those of ended processes are summed up here, since no exporter does."""
_KEY_DIGITS = 12


class Recording:
    """The series of this process, with labels of bounded cardinality.

    Parameters
    ----------
    file:
        Where they go.
    counts:
        False in a process whose counts another one records: only the progress is recorded.
    """

    def __init__(self, file: ProcessFile, counts: bool = True) -> None:
        self.file = file
        self.counts = counts
        self._known: dict[str, set[str]] = {}
        self.models: dict[str, ModelRecorder] = {}
        file.add(("series_dropped_total", ()), 0.0)

    def add(self, name: str, labels: tuple[str, ...], amount: float = 1.0) -> None:
        """Increase a counter or gauge."""
        if self.counts:
            self._kept(self.file.add((name, self._bounded(name, labels)), amount))

    def set(self, name: str, labels: tuple[str, ...], value: float) -> None:
        """Set a gauge."""
        if self.counts:
            self._kept(self.file.set((name, self._bounded(name, labels)), value))

    def observe(self, name: str, labels: tuple[str, ...], value: float | None) -> None:
        """Count a value of a histogram; None makes the series with zeros."""
        if self.counts:
            family = BY_NAME[name]
            bucket = -1 if value is None else bisect.bisect_left(family.buckets, value)
            key = name, self._bounded(name, labels)
            self._kept(self.file.observe(key, bucket, family.width, value or 0.0))

    def _kept(self, kept: bool) -> None:
        if not kept:
            self.file.add(("series_dropped_total", ()), 1.0)

    def _bounded(self, name: str, labels: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(self._known_value(label, value) for label, value in zip(BY_NAME[name].labels, labels, strict=True))

    def _known_value(self, label: str, value: str) -> str:
        known = self._known.setdefault(label, set())
        if value in known:
            return value
        if len(known) >= CAPS[label]:
            return OTHER
        known.add(value)
        return value


class ModelRecorder:
    """Records one model of this process; `ts_handlers.metrics.Recorder` is what the model's `Metrics` ask of it.

    After a fork the child records nothing until it begins a recording of its own.
    """

    def __init__(self, recording: Recording, model: str) -> None:
        self._recording = recording
        self._model = model
        self._progress = Progress()
        self._lock = threading.Lock()
        self._contexts: tuple[int, float, int] = (0, 0.0, 0)
        self._info: tuple[str, ...] | None = None
        for family in FAMILIES:
            if family.by == "process" and family.labels and family.type != "gauge":
                self._make_zeros(family)
        recording.add("batches_in_progress", (model,), 0.0)

    def _make_zeros(self, family: Family) -> None:
        zeros = family.zeros or (((),) if family.labels == ("model",) else ())
        for labels in zeros:
            if family.type == "histogram":
                self._recording.observe(family.name, (self._model, *labels), None)
            else:
                self._recording.add(family.name, (self._model, *labels), 0.0)

    # What a `Metrics` tells.

    def counted(self, name: str, amount: int, missed: tuple[str, ...]) -> None:
        """A counter of `ts_handlers.metrics.COUNTERS` was increased; `missed` are the key parts of the latest miss."""
        if name == "build":
            self._recording.add("builds_total", (self._model, reason_of(missed)), amount)
            return
        where = metric_of(name)
        if where is not None:
            self._recording.add(where[0], (self._model, *where[1]), amount)

    def phase_begins(self, name: str) -> None:
        """A phase of the start, or ``build: ...`` inside one."""
        if self._progress.ended is None:
            self._progress.enter(name)
            self._write()

    def expects(self, seconds: float | None) -> None:
        """How long the build took the last time."""
        self._progress.estimate = seconds
        self._write()

    def builds_beside(self, phase: str, estimate: float | None) -> None:
        """A build beside the model that serves has got on."""
        self._progress.ended = None
        self._progress.enter("wait" if phase == "wait" else "build")
        self._progress.phase, self._progress.estimate = phase, estimate
        self._write()

    def ended_beside(self, outcome: Outcome, described: Mapping[str, Any], build_ms: Mapping[str, float]) -> None:
        """A build beside the model that serves has ended; see `BackgroundBuild.describe` for `described`."""
        if described["state"] == "swapped":
            self._ready(outcome, described["phases_ms"], build_ms, described["elapsed_s"])
            return
        self._progress.end("failed", one_line(described["reason"] or "the build beside the eager model failed", 300))
        self._write()

    # What a start tells.

    def begin(self) -> None:
        """A start begins, or a server begins to make ready what a start belongs to."""
        before, self._progress = self._progress, Progress()
        if before.ended is None:
            self._progress.began = before.began
        self._write()

    def serves(self) -> None:
        """Requests are answered from now on, also where nothing was compiled under the model's own name."""
        if not self._progress.serving:
            self._progress.serving = True
            self._progress.end("ready")
            self._write()

    def started(self, outcome: Outcome, metrics: Metrics, seconds: float) -> None:
        """A start has ended with a model that serves.

        Parameters
        ----------
        seconds:
            From the start of the process.
        """
        self._ready(outcome, metrics.phases_ms, metrics.build_ms, seconds)

    def _ready(
        self, outcome: Outcome, phases_ms: Mapping[str, float], build_ms: Mapping[str, float], seconds: float
    ) -> None:
        model, backend, result = self._model, outcome.backend, outcome.result
        record = self._recording
        record.observe("start_seconds", (model, backend, result), seconds)
        for phase, took in phases_ms.items():
            record.observe("start_phase_seconds", (model, phase, backend, result), took / 1000)
        for phase, took in build_ms.items():
            record.observe("build_phase_seconds", (model, phase, backend), took / 1000)
        record.set("last_start_seconds", (model, result), seconds)
        record.set("last_start_timestamp_seconds", (model,), time.time())
        info = (model, backend, (outcome.key or "")[:_KEY_DIGITS], result)
        if self._info is not None:
            record.set("artifact_info", self._info, 0.0)
        self._info = info
        record.set("artifact_info", info, 1.0)
        self._progress.serving = True
        self._progress.end("ready")
        self._write()

    def failed(self, error: BaseException) -> None:
        """A start has ended with an error."""
        self._progress.end("failed", f"{type(error).__name__}: {one_line(error, 300)}")
        self._recording.add("start_failures_total", (self._model,))
        self._write()

    # What a server tells.

    @contextmanager
    def batch(self, requests: int) -> Iterator[None]:
        """The handler works on a batch inside the block."""
        record, labels = self._recording, (self._model,)
        record.add("batches_in_progress", labels)
        record.add("requests_total", labels, requests)
        began = time.perf_counter()
        try:
            yield
        finally:
            record.observe("batch_seconds", labels, time.perf_counter() - began)
            record.add("batches_in_progress", labels, -1.0)

    def request_failed(self, kind: str) -> None:
        """A client sees a request fail; one of `ts_handlers.monitoring.catalogue.FAILURE_KINDS`."""
        self._recording.add("request_errors_total", (self._model, kind))

    def contexts(self, stats: PoolStats) -> None:
        """What the pool of execution contexts says by now."""
        labels = (self._model,)
        now = stats.waited, stats.wait_seconds, stats.refused
        with self._lock:
            before, self._contexts = self._contexts, now
            if now[0] < before[0] or now[1] < before[1]:  # the model has been swapped
                before = (0, 0.0, 0)
        if stats.size:
            self._recording.set("contexts", labels, stats.size)
            self._recording.set("contexts_most_in_use", labels, stats.high_water)
        if now != before:
            names = ("context_queue_calls_total", "context_queue_seconds_total", "context_queue_refusals_total")
            for name, value, earlier in zip(names, now, before, strict=True):
                self._recording.add(name, labels, value - earlier)

    def _write(self) -> None:
        self._recording.file.write_progress(self._model, msgspec.structs.asdict(self._progress))


def folder_of(root: Path) -> Path:
    """Where the processes of this host record, in a state directory."""
    return root / FOLDER / (boot_id()[:13] or "host")


_lock = threading.Lock()
_recording: Recording | None = None


def begin_recording(store: Path, *, counts: bool = True) -> None:
    """Record from now on what this process does; once is enough.

    Parameters
    ----------
    store:
        Root of the store, beside whose files the series lie.
    counts:
        See `Recording`.
    """
    global _recording
    with _lock:
        if _recording is not None or os.environ.get(SWITCH) == "off":
            return
        problem: OSError | None = None
        for root in writable_directories(store):
            try:
                folder = folder_of(root)
                for each in (*reversed(root.parents), root, folder.parent, folder):
                    if not each.exists():  # as the store makes them: not as open as the umask allows
                        each.mkdir(mode=0o700, exist_ok=True)
                for each in (folder.parent, folder):
                    if not is_private_folder(each):
                        raise PermissionError(f"{each} can be written by others")
                _recording = Recording(ProcessFile(folder), counts)
                _sum_up_if_many(folder)
                return
            except OSError as error:
                problem = error
        logger.info("no metrics for the exporter are recorded: %s", problem)


def _sum_up_if_many(folder: Path) -> None:
    """Keep the folder small where no exporter does."""
    if sum(name.endswith(ENDING) for name in os.listdir(folder)) > MANY_FILES:
        from ts_handlers.monitoring.gathering import gather

        gather([folder])


def recorder_of(model: str) -> ModelRecorder | None:
    """What records a model of this process; None where nothing is recorded."""
    recording = _recording
    if recording is None:
        return None
    with _lock:
        if model not in recording.models:
            recording.models[model] = ModelRecorder(recording, model)
        return recording.models[model]


def stop_recording() -> None:
    """Record nothing any more; what was recorded stays."""
    global _recording
    with _lock:
        recording, _recording = _recording, None
    if recording is not None:
        recording.file.close()


def _forget_in_child() -> None:
    global _recording, _lock
    _lock = threading.Lock()
    recording, _recording = _recording, None
    if recording is not None:
        recording.file.close(forked=True)


os.register_at_fork(after_in_child=_forget_in_child)

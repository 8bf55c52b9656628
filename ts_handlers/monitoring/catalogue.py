"""Every metric of the exporter, declared once: its name, type, labels, unit and meaning.

`ts_handlers.metrics.COUNTERS` count in one process and keep their short names there. `COUNTED` says which metric and
which label value each of them is here.
"""

from __future__ import annotations

import msgspec

from ts_handlers.metrics import COUNTERS

PREFIX = "ts_handlers_"
OTHER = "other"
"""The label value in the place of those beyond `CAPS`."""
CAPS = {
    "model": 100,
    "phase": 40,
    "backend": 20,
    "result": 20,
    "reason": 20,
    "kind": 20,
    "state": 10,
    "event": 30,
    "key": 200,
    "version": 4,
}
"""How many values a label may have in all, beside `OTHER`."""
MISS_REASONS = (
    "none",  # no entry of this model is stored
    "format",
    "backend",
    "options",
    "model",
    "weights",
    "inputs",
    "device",
    "toolchain",
    "outside",
    "corrupt",
    "several",
)
"""Why there was no entry: the part of the key that missed, as `ts-handlers explain` names it."""
FAILURE_KINDS = ("invalid_input", "busy", "out_of_memory", "handler", "internal")
"""How a request can fail, see `ts_handlers.servers.torchserve.failures`."""

START_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 60.0, 120.0, 300.0, 600.0, 1800.0)
PHASE_BUCKETS = START_BUCKETS
BATCH_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)


class Family(msgspec.Struct, frozen=True):
    """One metric.

    Attributes
    ----------
    name:
        Without `PREFIX`.
    type:
        ``counter``, ``histogram`` or ``gauge``.
    help:
        What it is, in one sentence.
    labels:
        Names of its labels.
    buckets:
        Upper bounds of a histogram, in its unit, without the infinite one.
    zeros:
        Values of the labels after ``model`` with which a series exists from the start.
    merge:
        How gauges of several processes become one: ``sum`` or ``max``.
    by:
        ``process`` for what workers record, ``exporter`` for what the exporter finds when it is asked.
    """

    name: str
    type: str
    help: str
    labels: tuple[str, ...] = ("model",)
    buckets: tuple[float, ...] = ()
    zeros: tuple[tuple[str, ...], ...] = ()
    merge: str = "sum"
    by: str = "process"

    @property
    def full_name(self) -> str:
        """The name in the exposition."""
        return PREFIX + self.name

    @property
    def width(self) -> int:
        """How many numbers one series has: a histogram has a count for each bucket, the infinite one, and a sum."""
        return len(self.buckets) + 2 if self.type == "histogram" else 1


_RESULT = ("model", "result")
COUNTED: dict[str, tuple[str, tuple[str, ...]]] = {
    "hit": ("lookups_total", ("hit",)),
    "miss": ("lookups_total", ("miss",)),
    "build_failed": ("build_failures_total", ()),
    "build_skipped": ("builds_skipped_total", ()),
    "corrupt": ("corrupt_entries_total", ()),
    "quarantined": ("quarantine_refusals_total", ()),
    "fallback": ("fallbacks_total", ()),
    "publish_failed": ("publish_failures_total", ()),
    "canary_recorded": ("canary_records_total", ()),
    "outside_eager": ("outside_eager_calls_total", ()),
    "compile_after_ready": ("compilations_after_ready_total", ()),
    "evicted": ("evictions_total", ()),
    "background_build": ("background_builds_total", ()),
    "swap": ("swaps_total", ()),
    "background_failed": ("background_failures_total", ()),
    "remote_hit": ("remote_reads_total", ("hit",)),
    "remote_miss": ("remote_reads_total", ("miss",)),
    "remote_failed": ("remote_failures_total", ()),
    "remote_refused": ("remote_refusals_total", ()),
    "write_back": ("remote_writes_total", ("sent",)),
    "write_back_failed": ("remote_writes_total", ("failed",)),
    "takeover": ("lease_takeovers_total", ()),
}
"""Metric and label values after ``model`` of each counter. `BY_REASON` and `BY_REQUEST` are recorded in other ways."""
BY_REASON = ("build",)
BY_REQUEST = ("refused", "busy")
CACHE = "result_cache_"


def metric_of(counter: str) -> tuple[str, tuple[str, ...]] | None:
    """Metric and label values after ``model`` of a counter; None for one that is recorded in another way.

    Examples
    --------
    >>> metric_of("miss"), metric_of("result_cache_hit"), metric_of("build")
    (('lookups_total', ('miss',)), ('result_cache_events_total', ('hit',)), None)
    """
    if counter in BY_REASON or counter in BY_REQUEST:
        return None
    if counter.startswith(CACHE):
        return "result_cache_events_total", (counter.removeprefix(CACHE),)
    return COUNTED.get(counter)


_cache_events = tuple((name.removeprefix(CACHE),) for name in COUNTERS if name.startswith(CACHE))

FAMILIES: tuple[Family, ...] = (
    # Starts
    Family(
        "start_seconds",
        "histogram",
        "Time from the start of the process until the model was ready; with result swapped, until the swap.",
        ("model", "backend", "result"),
        START_BUCKETS,
    ),
    Family(
        "start_phase_seconds",
        "histogram",
        "Time that a start spent in one phase, without the phases inside it.",
        ("model", "phase", "backend", "result"),
        PHASE_BUCKETS,
    ),
    Family(
        "build_phase_seconds",
        "histogram",
        "Time that a build spent in one of its phases.",
        ("model", "phase", "backend"),
        PHASE_BUCKETS,
    ),
    Family("start_failures_total", "counter", "Starts that ended with an error instead of a ready model."),
    Family(
        "last_start_seconds",
        "gauge",
        "Duration of the slowest latest start among the workers.",
        ("model", "result"),
        merge="max",
    ),
    Family(
        "last_start_timestamp_seconds",
        "gauge",
        "When a worker was last ready, in seconds since the epoch.",
        merge="max",
    ),
    Family(
        "artifact_info",
        "gauge",
        "What the workers serve: backend, first digits of the cache key and how the start ended; 1 for each worker.",
        ("model", "backend", "key", "result"),
    ),
    # The store
    Family("lookups_total", "counter", "Lookups in the store, by result.", _RESULT, zeros=(("hit",), ("miss",))),
    Family(
        "builds_total",
        "counter",
        "Artifacts built, by the part of the key that missed.",
        ("model", "reason"),
        zeros=tuple((reason,) for reason in MISS_REASONS),
    ),
    Family("build_failures_total", "counter", "Builds of which nothing to serve came."),
    Family("builds_skipped_total", "counter", "Builds not tried because they had failed a short time before."),
    Family("corrupt_entries_total", "counter", "Entries found damaged and moved aside."),
    Family("quarantine_refusals_total", "counter", "Entries or builds not tried because they ended a process before."),
    Family("fallbacks_total", "counter", "Backends that failed at a start, so that the next one was tried."),
    Family("publish_failures_total", "counter", "Artifacts served without being published."),
    Family("canary_records_total", "counter", "Answers of the eager model recorded for new weights."),
    Family("evictions_total", "counter", "Entries evicted to make room."),
    Family("background_builds_total", "counter", "Builds begun in a child process beside an eager model."),
    Family("swaps_total", "counter", "Eager models replaced by the artifact built beside them."),
    Family("background_failures_total", "counter", "Builds beside an eager model that ended without a swap."),
    Family(
        "remote_reads_total",
        "counter",
        "Entries asked of the remote store, by result.",
        _RESULT,
        zeros=(("hit",), ("miss",)),
    ),
    Family(
        "remote_writes_total",
        "counter",
        "Entries and canary records sent to the remote store, by result.",
        _RESULT,
        zeros=(("sent",), ("failed",)),
    ),
    Family("remote_failures_total", "counter", "Times the remote store or the lease service failed to answer."),
    Family("remote_refusals_total", "counter", "Remote objects not used: unsigned, foreign or damaged."),
    Family("lease_takeovers_total", "counter", "Build leases taken from another host that was lost."),
    # Requests
    Family("requests_total", "counter", "Requests handed to the handler."),
    Family(
        "request_errors_total",
        "counter",
        "Requests that clients saw fail, by kind; docs/errors.md has the kinds.",
        ("model", "kind"),
        zeros=tuple((kind,) for kind in FAILURE_KINDS),
    ),
    Family(
        "batch_seconds",
        "histogram",
        "Time the handler spent on one batch of requests, from preprocess to postprocess.",
        ("model",),
        BATCH_BUCKETS,
        zeros=((),),
    ),
    Family("batches_in_progress", "gauge", "Batches that workers work on at this moment."),
    Family("outside_eager_calls_total", "counter", "Calls answered by the eager module instead of the artifact."),
    Family("compilations_after_ready_total", "counter", "Graphs compiled for requests after the model was ready."),
    Family("contexts", "gauge", "Execution contexts: calls that can run at once."),
    Family("contexts_most_in_use", "gauge", "Most execution contexts that were in use at one moment."),
    Family("context_queue_calls_total", "counter", "Calls that had to wait for an execution context."),
    Family("context_queue_seconds_total", "counter", "Time that calls waited for an execution context, together."),
    Family("context_queue_refusals_total", "counter", "Calls refused because no execution context came free in time."),
    Family(
        "result_cache_events_total",
        "counter",
        "What the result cache did, by event.",
        ("model", "event"),
        zeros=_cache_events,
    ),
    # Found by the exporter
    Family("model_ready", "gauge", "1 while at least one worker serves the model, else 0.", merge="max", by="exporter"),
    Family(
        "workers",
        "gauge",
        "Living processes that start or serve the model, by state.",
        ("model", "state"),
        by="exporter",
    ),
    Family("store_bytes", "gauge", "Size of the entries in the store.", (), by="exporter"),
    Family("store_entries", "gauge", "Entries in the store.", (), by="exporter"),
    Family("store_damaged_entries", "gauge", "Entries in the store that cannot be read.", (), by="exporter"),
    Family("store_free_bytes", "gauge", "Free space on the disk of the store.", (), by="exporter"),
    Family(
        "store_quarantined", "gauge", "Quarantined entries and builds, and failed builds on record.", (), by="exporter"
    ),
    Family(
        "series_dropped_total", "counter", "Updates of series for which a process had no room left.", (), by="process"
    ),
    Family("exporter_info", "gauge", "Version of the package that exports; always 1.", ("version",), by="exporter"),
)
BY_NAME = {family.name: family for family in FAMILIES}


def reason_of(missed: tuple[str, ...]) -> str:
    """The label value for what made a lookup miss.

    Examples
    --------
    >>> reason_of(()), reason_of(("weights",)), reason_of(("model", "inputs"))
    ('none', 'weights', 'several')
    """
    if len(missed) > 1:
        return "several"
    return (missed[0] if missed[0] in MISS_REASONS else OTHER) if missed else "none"

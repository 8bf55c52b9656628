"""Every metric of the package, declared once, and the phases of a start.

Counters are per process. Phases time the steps of a start. Both go to the server's metrics, to the log as one
structured line, and to `describe`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

from ts_handlers.system.processes import process_age_ms

_LOCK = threading.Lock()
_DYNAMO = "torch._dynamo.utils"

PHASES = (
    "process",  # age of the process when the handler was asked to initialise: interpreter, torch, handler imports
    "key",
    "lookup",
    "fetch",  # from the remote store: entries and canary records
    "wait",  # for another process's build
    "build",
    "publish",
    "load",
    "canary",
    "warmup",
)
"""Phases of a start, in the order in which a start goes through them."""

BUILD_PHASES = (
    "import",  # of a compiler that takes seconds to import
    "export",
    "prove",  # that a plan may take other weights
    "convert",  # into a TensorRT network and plan
    "compile",
    "verify",  # against eager
)
"""Phases inside ``build``. A backend of another package names its own with a dot: ``my_backend.quantise``."""

COUNTERS = (
    "hit",
    "miss",
    "build",
    "build_failed",  # nothing to serve came of it
    "build_skipped",  # because it has failed a short time ago
    "corrupt",
    "quarantined",
    "fallback",
    "publish_failed",
    "canary_recorded",
    "outside_eager",
    "refused",
    "busy",
    "compile_after_ready",  # graphs that Dynamo compiled for requests, see `graphs_for_requests`
    "evicted",
    "background_build",  # child processes started to build
    "swap",  # from eager to the artifact that a child process has built
    "background_failed",
    "remote_hit",  # entries that were fetched
    "remote_miss",
    "remote_failed",  # how often the remote or the lease service did not answer as it should
    "remote_refused",  # objects that must not be used: unsigned, foreign, damaged
    "write_back",
    "write_back_failed",
    "takeover",  # leases taken from another host that was lost
    "result_cache_hit",  # requests (``on: tensors``: rows, or calls) that a stored answer has answered
    "result_cache_miss",
    "result_cache_coalesced",  # answered by what was computed for an equal request at the same time
    "result_cache_bypass",  # answered apart from the cache
    "result_cache_evicted",
    "result_cache_expired",
    "result_cache_oversize",  # answers that are larger than the cache
    "result_cache_remote_hit",
    "result_cache_remote_miss",
    "result_cache_remote_failed",  # requests answered without the shared tier, which did not answer
    "result_cache_remote_refused",  # its values that must not be used
)


class Recorder(Protocol):
    """What keeps a model's metrics for the exporter; `ts_handlers.monitoring.recorder.ModelRecorder` is one."""

    def counted(self, name: str, amount: int, missed: tuple[str, ...]) -> None:
        """A counter was increased; `missed` are the parts of the key that the latest lookup missed."""

    def phase_begins(self, name: str) -> None:
        """A phase begins, one of a build as ``build: export``."""

    def expects(self, seconds: float | None) -> None:
        """How long the build took the last time, None when that is not known."""

    def builds_beside(self, phase: str, estimate: float | None) -> None:
        """A build beside the model that serves has got on."""

    def ended_beside(self, outcome: Any, described: Mapping[str, Any], build_ms: Mapping[str, float]) -> None:
        """A build beside the model that serves has ended, with a swap or without."""


_server = threading.local()


@contextlib.contextmanager
def refusals_counted_by_server() -> Iterator[None]:
    """Inside the block, in this thread, a refused call is counted by the server, when a client sees it refused."""
    before, _server.counts = getattr(_server, "counts", False), True
    try:
        yield
    finally:
        _server.counts = before


@dataclasses.dataclass
class Metrics:
    """Phases in milliseconds and counters of one model in one process.

    `observer` is called with the name of each phase when it begins, those of a build as ``build: export``. `recorder`
    keeps the same for the exporter, and `missed` names the parts of the key that the latest lookup missed.
    """

    phases_ms: dict[str, float] = dataclasses.field(default_factory=dict)
    build_ms: dict[str, float] = dataclasses.field(default_factory=dict)
    counters: dict[str, int] = dataclasses.field(default_factory=lambda: dict.fromkeys(COUNTERS, 0))
    observer: Callable[[str], None] | None = None
    recorder: Recorder | None = None
    missed: tuple[str, ...] = ()
    _inner_ms: list[float] = dataclasses.field(default_factory=list)

    @classmethod
    def of_this_process(cls) -> Metrics:
        """New metrics, with the process's age as the phase ``process``."""
        age = process_age_ms()
        return cls() if age is None else cls(phases_ms={"process": age})

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the duration of the block to a phase of `PHASES`, without that of phases inside the block.

        Raises
        ------
        ValueError
            The phase is not declared.
        """
        if name not in PHASES:
            raise ValueError(f"no phase of a start is called {name!r}; declared are {', '.join(PHASES)}")
        self._begin(name)
        self._inner_ms.append(0.0)
        before = self.phases_ms.get(name, 0.0)
        try:
            with _timed(self.phases_ms, name):
                yield
        finally:
            inner, total = self._inner_ms.pop(), self.phases_ms[name] - before
            self.phases_ms[name] -= inner
            if self._inner_ms:
                self._inner_ms[-1] += total

    @contextlib.contextmanager
    def build_phase(self, name: str) -> Iterator[None]:
        """Add the duration of the block to a phase of `BUILD_PHASES`, or to one that a backend names with a dot.

        Raises
        ------
        ValueError
            The phase is not declared and has no dot.
        """
        if name not in BUILD_PHASES and "." not in name:
            raise ValueError(
                f"no phase of a build is called {name!r}; declared are {', '.join(BUILD_PHASES)}, and a backend names "
                "its own with a dot, as in 'my_backend.quantise'"
            )
        self._begin(f"build: {name}")
        with _timed(self.build_ms, name):
            yield

    def count(self, name: str, amount: int = 1) -> None:
        """Increase a declared counter."""
        with _LOCK:  # requests come in several threads
            self.counters[name] += amount
        if self.recorder is not None and amount:
            self.recorder.counted(name, amount, self.missed)

    def count_refusal(self, name: str, error: Exception) -> None:
        """Count a call that was refused, here or by the server: a batch that is answered again would count twice.

        Parameters
        ----------
        name:
            The counter.
        error:
            What refuses the call; see `refused_by`.
        """
        if getattr(_server, "counts", False):
            error.__dict__["refused_by"] = self
        elif "refused_by" not in error.__dict__:
            self.count(name)
            error.__dict__["refused_by"] = None

    def _begin(self, phase: str) -> None:
        if self.observer is not None:
            self.observer(phase)
        if self.recorder is not None:
            self.recorder.phase_begins(phase)

    def counted(self) -> dict[str, int]:
        """The counters at one moment."""
        with _LOCK:
            return dict(self.counters)


def count_as_seen(name: str, error: Exception, default: Metrics | None) -> None:
    """Count a request that a client sees refused: with the model that refused it, otherwise with `default`."""
    metrics: Metrics | None = error.__dict__.get("refused_by", default)
    if metrics is not None:  # None is noted where it was counted already
        metrics.count(name)


@contextlib.contextmanager
def _timed(durations: dict[str, float], name: str) -> Iterator[None]:
    started = time.perf_counter()
    try:
        yield
    finally:
        durations[name] = durations.get(name, 0.0) + (time.perf_counter() - started) * 1000


def dynamo_counter(group: str, name: str) -> int:
    """A counter of torch._dynamo, 0 when it has not been imported, or another thread is importing it."""
    utils: Any = sys.modules.get(_DYNAMO)
    if utils is None:
        return 0
    counters = getattr(utils, "counters", None)
    return 0 if counters is None else int(counters[group].get(name, 0))


def compiled_graphs() -> int:
    """Number of graphs that Dynamo has compiled in this process."""
    return dynamo_counter("stats", "unique_graphs")


_graphs_seen = 0
_starts_under_way = 0


@contextlib.contextmanager
def start_under_way() -> Iterator[None]:
    """What Dynamo compiles inside the block belongs to a start, also if a request meets it first."""
    global _graphs_seen, _starts_under_way
    with _LOCK:
        _starts_under_way += 1
    try:
        yield
    finally:
        with _LOCK:
            _starts_under_way -= 1
            _graphs_seen = compiled_graphs()


def graphs_for_requests() -> int:
    """How many graphs Dynamo has compiled in this process since the last call, each of them told once.

    Called after every request, by all models of the process; it compares two integers unless there is one to tell.
    While a start is under way nothing is told: Dynamo's counter does not say for whom it compiled. Not seen is what
    compiles without Dynamo, such as the kernels of TensorRT for RTX at their first run.
    """
    global _graphs_seen
    if _DYNAMO not in sys.modules:  # as with `aot_inductor` and `tensorrt`; asked first, because it costs least
        return 0
    graphs = compiled_graphs()
    if graphs == _graphs_seen:
        return 0
    with _LOCK:
        new, _graphs_seen = graphs - _graphs_seen, graphs
        return 0 if _starts_under_way else max(new, 0)  # torch._dynamo.reset may have set it back

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
from collections.abc import Callable, Iterator

from ts_handlers.system.processes import process_age_ms

_LOCK = threading.Lock()

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
    "compile_after_ready",
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
)


@dataclasses.dataclass
class Metrics:
    """Phases in milliseconds and counters of one model in one process.

    `observer` is called with the name of each phase when it begins, those of a build as ``build: export``.
    """

    phases_ms: dict[str, float] = dataclasses.field(default_factory=dict)
    build_ms: dict[str, float] = dataclasses.field(default_factory=dict)
    counters: dict[str, int] = dataclasses.field(default_factory=lambda: dict.fromkeys(COUNTERS, 0))
    observer: Callable[[str], None] | None = None
    _inner_ms: list[float] = dataclasses.field(default_factory=list)

    @classmethod
    def of_this_process(cls) -> Metrics:
        """New metrics, with the process's age as the phase ``process``."""
        age = process_age_ms()
        return cls() if age is None else cls(phases_ms={"process": age})

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the duration of the block to a phase, without that of phases inside the block."""
        if self.observer is not None:
            self.observer(name)
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
        """Add the duration of the block to a phase of the build."""
        if self.observer is not None:
            self.observer(f"build: {name}")
        with _timed(self.build_ms, name):
            yield

    def count(self, name: str, amount: int = 1) -> None:
        """Increase a declared counter."""
        with _LOCK:  # requests come in several threads
            self.counters[name] += amount

    def counted(self) -> dict[str, int]:
        """The counters at one moment."""
        with _LOCK:
            return dict(self.counters)


@contextlib.contextmanager
def _timed(durations: dict[str, float], name: str) -> Iterator[None]:
    started = time.perf_counter()
    try:
        yield
    finally:
        durations[name] = durations.get(name, 0.0) + (time.perf_counter() - started) * 1000


def dynamo_counter(group: str, name: str) -> int:
    """A counter of torch._dynamo, 0 when it has not been imported."""
    utils = sys.modules.get("torch._dynamo.utils")
    return int(utils.counters[group][name]) if utils is not None else 0


def compiled_graphs() -> int:
    """Number of graphs that Dynamo has compiled in this process."""
    return dynamo_counter("stats", "unique_graphs")

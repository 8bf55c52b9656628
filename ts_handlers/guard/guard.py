"""The crash guard: native code that ends the process is tried a bounded number of times, then quarantined.

A process that builds or loads writes a marker (`ts_handlers.guard.markers`) and holds an exclusive `flock` on it, which
the kernel releases when it dies, however it dies; leaving the block removes the marker. What a dead process left is
judged by the next start of the same key:

- a crash, the time limit, or a kill by the kernel for lack of memory: quarantined at once;
- SIGTERM: somebody ended it on purpose; forgotten;
- no trace: SIGKILL, which is what TorchServe sends when it scales down, stops, or has waited for startupTimeout. One
  such death is forgiven (two for a build). Processes that die together count as one: a marker's generation is above
  those of the dead that its process found. An attempt that succeeds, and a day, forgive them all. After more it is
  quarantined: whatever kills it, it is not tried for ever.

A build that ends with an exception is remembered too, for a while: see `ts_handlers.guard.failures`.

See docs/decisions/0007-crash-guard.md.
"""

from __future__ import annotations

import contextlib
import logging
import os
import platform
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from ts_handlers.errors import FINAL, BuildError, CanaryError, FailedBeforeError, QuarantinedError, one_line
from ts_handlers.guard.markers import Death, Marker, read_deaths, write_marker
from ts_handlers.guard.quarantine import Quarantine, read_quarantines, write_quarantine
from ts_handlers.guard.state_directory import MARKERS, writable_directories
from ts_handlers.key.cache_key import CacheKey
from ts_handlers.key.fingerprint import runtime_identity
from ts_handlers.settings import Settings
from ts_handlers.system.durations import span
from ts_handlers.system.process_limits import bounded_memory, last_words, oom_kills, time_limit

if TYPE_CHECKING:
    import torch

    from ts_handlers.execution.base import Run

logger = logging.getLogger(__name__)

FORGIVEN = {"build": 2, "load": 1}
"""Deaths without a trace, one after the other, that are not yet a reason."""
AUTO_SECONDS = 120.0
WITHOUT_A_TRACE = "ended without a trace"


class Guard:
    """Guards one key of one store in this process.

    Parameters
    ----------
    root:
        The store's root.
    weights:
        Gives the digest of the weights; asked only when a record depends on it.
    retry_since:
        Builds that failed before this time (seconds since the epoch) are tried again, however short ago that was; None
        when they are not. What fails while this process waits for its turn counts as its own failure.

    Attributes
    ----------
    problem:
        Why no marker could be made, or None: the model is then served without a guard.
    """

    def __init__(
        self,
        root: Path,
        settings: Settings,
        key: CacheKey,
        model: str,
        weights: Callable[[], str],
        retry_since: float | None = None,
    ) -> None:
        self._root = root
        self._settings = settings
        self._key = key
        self._model = model
        self._weights = weights
        self._retry_since = retry_since
        self._descriptor: int | None = None
        self._seconds: float | None = None
        self.problem: str | None = None

    @property
    def _canary(self) -> str:
        return f"tolerance={self._settings.canary.tolerance} seed={self._settings.canary.seed}"

    def refuse(self, seal: str = "") -> None:
        """Raise when the entry with this seal (empty: whatever is built) is not to be tried; judges the dead first.

        Raises
        ------
        QuarantinedError, FailedBeforeError
            With the reason and how to lift it.
        """
        judged = self._judge()
        for record in [*read_quarantines(self._root, self._key.digest, builds=not seal), *judged]:
            runtime = _runtime_of(record)
            if not record.applies(seal, runtime, self._canary, self._weights):
                continue
            lift = f"`ts-handlers unquarantine {self._key.digest[:12]} --store {self._root}`"
            if not record.kind:
                what = f"entry {self._key.digest}" if seal else f"building key {self._key.digest}"
                raise QuarantinedError(
                    f"{what} is quarantined since {record.time}: {record.reason}; it is tried again with another "
                    f"torch, C or C++ library or driver, with a rebuilt entry, or after {lift}"
                )
            if self._retry_since is None or record.failed_at >= self._retry_since:
                times = f", {record.count} times in a row" if record.count > 1 else ""
                error = FailedBeforeError(
                    f"a build failed {span(time.time() - record.failed_at)} ago{times} and is tried again "
                    f"{record.retry}, by `ts-handlers prewarm`, or after {lift}: {record.reason}"
                )
                error.unbuildable = record.unbuildable
                raise error

    @contextlib.contextmanager
    def remembered(self) -> Iterator[None]:
        """Run a build: an exception that ends the block is kept for later starts, a good end removes what was kept."""
        from ts_handlers.guard.failures import forget_failures, kind_of, remember_failure

        began = time.monotonic()
        try:
            yield
        except FINAL:
            raise
        except Exception as error:
            if not isinstance(error, CanaryError):  # a quarantine of its own
                reason = f"{type(error).__name__}: {one_line(error)}"
                took = time.monotonic() - began
                remember_failure(
                    self._root,
                    self._key.digest,
                    self._model,
                    self._key["backend"],
                    reason,
                    kind_of(error),
                    took,
                    unbuildable=isinstance(error, BuildError),
                )
            raise
        forget_failures(self._root, self._key.digest)

    def quarantine_canary(self, seal: str, error: Exception) -> None:
        """Remember that the artifact answers wrongly with these weights."""
        write_quarantine(
            self._root,
            Quarantine(
                key=self._key.digest,
                model=self._model,
                backend=self._key["backend"],
                phase="canary",
                seal=seal,
                runtime=runtime_identity(),
                reason=f"{type(error).__name__}: {error}",
                weights=self._weights(),
                canary=self._canary,
                time=_now(),
                host=platform.node(),
                pid=os.getpid(),
            ),
        )

    @contextlib.contextmanager
    def marked(self, phase: str, seal: str = "", build_seconds: float = 0.0) -> Iterator[None]:
        """Run the block under a marker; when it ends well, unexplained deaths of the same attempt are forgiven.

        Parameters
        ----------
        phase:
            A key of `FORGIVEN`.
        build_seconds:
            What the artifact took to build, for the time limit ``auto``.
        """
        seconds = self._settings.guard.load_seconds
        self._seconds = max(AUTO_SECONDS, 2 * build_seconds) if seconds == "auto" else seconds
        made = self._mark(phase, seal)
        if made is None:
            yield
            return
        path, self._descriptor, marker = made
        try:
            with last_words(self._descriptor):
                yield
            for death in self._dead():
                if death.marker.same_attempt(marker) and death.cause is None:
                    with contextlib.suppress(OSError):
                        death.path.unlink()
        finally:
            with contextlib.suppress(OSError):
                path.unlink()
            os.close(self._descriptor)
            self._descriptor = None

    @contextlib.contextmanager
    def limited(self) -> Iterator[None]:
        """Inside `marked`: bound the block's duration and memory, as `GuardSettings` says.

        Without a marker there are no limits, because nothing would keep the next start from running into them.
        """
        descriptor = self._descriptor
        if descriptor is None:
            yield
            return
        with time_limit(self._seconds, descriptor), bounded_memory(self._settings.guard.load_memory_mb):
            yield

    def limit(self, run: Run) -> Run:
        """The same function, each of its calls under `limited`."""

        def limited_run(tensors: list[torch.Tensor]) -> Any:
            with self.limited():
                return run(tensors)

        return limited_run

    def _mark(self, phase: str, seal: str) -> tuple[Path, int, Marker] | None:
        marker = Marker(
            key=self._key.digest,
            model=self._model,
            backend=self._key["backend"],
            phase=phase,
            seal=seal,
            runtime=runtime_identity(),
            generation=0,
            seconds=self._seconds,
            memory_mb=self._settings.guard.load_memory_mb,
            oom_kills=oom_kills(),
            time=_now(),
            host=platform.node(),
            pid=os.getpid(),
        )
        before = [death.marker.generation + 1 for death in self._dead() if death.marker.same_attempt(marker)]
        marker = msgspec.structs.replace(marker, generation=max(before, default=0))
        reason: OSError | None = None
        for directory in writable_directories(self._root):
            try:
                return *write_marker(directory / MARKERS, self._key.digest, msgspec.json.encode(marker)), marker
            except OSError as error:
                reason = error
        self.problem = f"no crash guard: neither the store nor the temporary folder can be written ({reason})"
        return None

    def _dead(self) -> list[Death]:
        return read_deaths(self._root, self._key.digest)

    def _judge(self) -> list[Quarantine]:
        """Turn what dead processes left into records, and remove it; returns the records."""
        records = []
        deaths = self._dead()
        for death in deaths:
            marker, cause = death.marker, death.cause
            if cause is None:
                alike = [other for other in deaths if other.cause is None and other.marker.same_attempt(marker)]
                times = len({other.marker.generation for other in alike if not other.is_forgotten})
                if death.is_forgotten:
                    cause = "", ""
                elif times <= FORGIVEN.get(marker.phase, 1):
                    continue
                else:
                    cause = _without_a_trace(times, marker.phase), ""
            reason, details = cause
            if reason:
                record = Quarantine(
                    key=marker.key,
                    model=marker.model,
                    backend=marker.backend,
                    phase=marker.phase,
                    seal=marker.seal,
                    runtime=marker.runtime,
                    reason=reason,
                    details=details,
                    time=marker.time,
                    host=marker.host,
                    pid=marker.pid,
                )
                records.append(record)
                if not write_quarantine(self._root, record):
                    continue  # the marker is then what later starts find
            with contextlib.suppress(OSError):
                death.path.unlink()
        return records


def _runtime_of(record: Quarantine) -> dict[str, str]:
    """What a record of the runtime at hand would say."""
    if not record.kind:
        return runtime_identity()
    from ts_handlers.guard.failures import build_runtime

    return build_runtime()


def remember_death(root: Path, pid: int, reason: str) -> None:
    """Keep, as a failed build, what a process of this host was building when its limits or the kernel ended it.

    A death whose cause its marker tells is left to the next start, which quarantines it.
    """
    from ts_handlers.guard.failures import CIRCUMSTANTIAL, remember_failure

    for death in read_deaths(root):
        marker, cause = death.marker, death.cause
        if (marker.pid, marker.host, marker.seal) == (pid, platform.node(), "") and not (cause and cause[0]):
            took = time.time() - death.began
            remember_failure(root, marker.key, marker.model, marker.backend, one_line(reason), CIRCUMSTANTIAL, took)


def _without_a_trace(times: int, phase: str) -> str:
    return (
        f"the process {WITHOUT_A_TRACE} {times} times in a row in the phase {phase}, as by "
        "SIGKILL (out of memory, or startupTimeout too short) or by exit() in native code"
    )


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())

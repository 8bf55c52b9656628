"""The crash guard: native code that ends the process is tried a bounded number of times, then quarantined.

A process that builds or loads writes a marker (`ts_handlers.guard.markers`) and holds an exclusive `flock` on it, which
the kernel releases when it dies, however it dies; leaving the block removes the marker. What a dead process left is
judged by the next start of the same key (`ts_handlers.guard.judgement`):

- a crash or the time limit: quarantined at once, until it is lifted;
- a crash of a build on a full disk: a failed build, which is tried again when there is room;
- SIGTERM: somebody ended it on purpose; forgotten;
- a kill by the kernel for lack of memory, of this boot and control group and a moment ago: quarantined at once, for a
  day, because the kernel chooses its victims by size and not by guilt; the next time for two days, and so on;
- no trace: SIGKILL, which is what TorchServe sends when it scales down, stops, or has waited for startupTimeout; or a
  crash in another Python thread of the process. One such death is forgiven (two for a build). Processes that die
  together count as one, because their markers bear the same number of an attempt. An attempt that succeeds, and a day,
  forgive them all. After more it is quarantined for a day, and then for twice as long each time.

A build that ends with an exception is remembered too, for a while: see `ts_handlers.guard.failures`.

See docs/decisions/0007-crash-guard.md.
"""

from __future__ import annotations

import contextlib
import logging
import os
import platform
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from ts_handlers.errors import (
    FINAL,
    BuildError,
    CanaryError,
    DiskFullError,
    FailedBeforeError,
    QuarantinedError,
    SampleError,
    one_line,
)
from ts_handlers.guard.judgement import judge
from ts_handlers.guard.markers import Marker, read_crash_records, write_marker
from ts_handlers.guard.quarantine import read_quarantines, record_files, write_record
from ts_handlers.guard.records import FailedBuild, Quarantine
from ts_handlers.guard.state_directory import MARKERS, writable_directories
from ts_handlers.key.cache_key import CacheKey
from ts_handlers.key.fingerprint import runtime_identity
from ts_handlers.settings import Settings
from ts_handlers.system.durations import span
from ts_handlers.system.files import close_if_same, is_at, open_locked
from ts_handlers.system.free_space import free_bytes
from ts_handlers.system.process_limits import (
    bounded_memory,
    crash_report_to,
    memory_group,
    oom_kills,
    redirect_crash_report,
    time_limit,
)
from ts_handlers.system.processes import boot_id

if TYPE_CHECKING:
    import torch

    from ts_handlers.execution.base import Run

logger = logging.getLogger(__name__)

AUTO_SECONDS = 120.0


class Guard:
    """Guards one key of one store in this process.

    Parameters
    ----------
    store:
        The store's folder on this host, where the guard keeps its files, see `ts_handlers.guard.state_directory`.
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
        store: Path,
        settings: Settings,
        key: CacheKey,
        model: str,
        weights: Callable[[], str],
        retry_since: float | None = None,
    ) -> None:
        self._store = store
        self._settings = settings
        self._key = key
        self._model = model
        self._weights = weights
        self._retry_since = retry_since
        self._descriptor: int | None = None
        self._path: Path | None = None
        self._has_lapsed = False
        self._seconds: float | None = None
        self.problem: str | None = None

    @property
    def _canary(self) -> str:
        return f"tolerance={self._settings.canary.tolerance} seed={self._settings.canary.seed}"

    def refuse(self, digest: str = "") -> None:
        """Raise when something is not to be tried; judges first what dead processes left.

        Parameters
        ----------
        digest:
            Of the manifest of the entry that is to be loaded; empty for a build.

        Raises
        ------
        QuarantinedError, FailedBeforeError
            With the reason and how to lift it.
        """
        judged = judge(self._store, self._key.digest)
        for record in [*read_quarantines(self._store, self._key.digest, builds=not digest), *judged]:
            self._has_lapsed |= isinstance(record, Quarantine) and record.is_over
            if isinstance(record, FailedBuild):
                if not digest:
                    self._refuse_failed_build(record)
            elif record.applies(digest, runtime_identity(), self._canary, self._weights):
                what = f"entry {self._key.digest}" if digest else f"building key {self._key.digest}"
                raise QuarantinedError(
                    f"{what} is quarantined since {record.time}: {record.reason}; it is tried again with another "
                    f"torch, C or C++ library or driver, with a rebuilt entry, {record.retry}, or after {self._lift}"
                )

    def _refuse_failed_build(self, record: FailedBuild) -> None:
        if record.is_over or not self._is_the_same(record):
            return
        if self._retry_since is None or record.failed_at >= self._retry_since:
            times = f", {record.count} times in a row" if record.count > 1 else ""
            error = FailedBeforeError(
                f"a build failed {span(time.time() - record.failed_at)} ago{times} and is tried again "
                f"{record.retry}, by `ts-handlers prewarm`, or after {self._lift}: {record.reason}"
            )
            error.unbuildable = record.unbuildable
            raise error

    def _is_the_same(self, record: FailedBuild) -> bool:
        """Whether a build now would meet what it met then."""
        from ts_handlers.guard.failures import build_runtime, circumstances

        return record.runtime == build_runtime() and record.depends in ("", circumstances(self._settings))

    def hopeless_build(self) -> FailedBuild | None:
        """The record of a failed build whose time to be tried again has come, and which will hardly end otherwise."""
        from ts_handlers.guard.failures import is_hopeless

        if self._retry_since is not None:
            return None
        for record in read_quarantines(self._store, self._key.digest):
            if isinstance(record, FailedBuild) and is_hopeless(record) and self._is_the_same(record):
                return record
        return None

    @property
    def _lift(self) -> str:
        """The command after which what is refused is tried again."""
        return f"`ts-handlers unquarantine {self._key.digest[:12]} --store {self._store}`"

    @contextlib.contextmanager
    def remembered(self) -> Iterator[None]:
        """Run a build: an exception that ends the block is kept for later starts, a good end removes what was kept."""
        from ts_handlers.guard.failures import circumstances, forget_failures, kind_of, remember_failure

        depends = circumstances(self._settings)  # before the build changes variables
        began = time.monotonic()
        try:
            yield
        except FINAL:
            raise
        except Exception as error:
            if not isinstance(error, (CanaryError, SampleError)):  # a quarantine of its own; nobody's fault
                reason = f"{type(error).__name__}: {one_line(error)}"
                took = time.monotonic() - began
                remember_failure(
                    self._store,
                    self._key.digest,
                    self._model,
                    self._key["backend"],
                    reason,
                    kind_of(error),
                    took,
                    unbuildable=isinstance(error, BuildError),
                    free=error.free if isinstance(error, DiskFullError) else None,
                    depends=depends,
                )
            raise
        forget_failures(self._store, self._key.digest)

    def quarantine_canary(self, digest: str, error: Exception) -> None:
        """Remember that the artifact answers wrongly with these weights."""
        write_record(
            self._store,
            Quarantine(
                key=self._key.digest,
                model=self._model,
                backend=self._key["backend"],
                phase="canary",
                digest=digest,
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
    def marked(self, phase: str, digest: str = "", build_seconds: float = 0.0) -> Iterator[None]:
        """Run the block under a marker; when it ends well, crashes of the same work without a trace are forgiven.

        Parameters
        ----------
        phase:
            A key of `FORGIVEN`.
        digest:
            As in `refuse`.
        build_seconds:
            What the artifact took to build, for the time limit ``auto``.
        """
        seconds = self._settings.guard.load_seconds
        self._seconds = max(AUTO_SECONDS, 2 * build_seconds) if seconds == "auto" else seconds
        made = self._mark(phase, digest)
        if made is None:
            yield
            return
        self._path, self._descriptor, marker = made
        identity = os.fstat(self._descriptor)
        try:
            with crash_report_to(self._descriptor):
                yield
            self._forgive(marker)
        finally:
            with contextlib.suppress(OSError):
                self._path.unlink()
            close_if_same(self._descriptor, identity)
            self._descriptor = self._path = None

    def _forgive(self, marker: Marker) -> None:
        """What was tried went well: forget that it had ended processes without a certain cause."""
        for crash in read_crash_records(self._store, self._key.digest):
            if crash.marker.same_work(marker) and crash.cause is None:
                with contextlib.suppress(OSError):
                    crash.path.unlink()
        if not self._has_lapsed:
            return
        for path, record in record_files(self._store, self._key.digest):
            same = (record.phase, record.digest, record.runtime) == (marker.phase, marker.digest, marker.runtime)
            if isinstance(record, Quarantine) and record.is_over and same:
                with contextlib.suppress(OSError):
                    path.unlink()

    def _open_again(self) -> int | None:
        """The descriptor of the marker; a new one if native code has closed it, and None if there is none any more.

        Native code that closes descriptors which are not its own, all above 2 for example, gives up the marker's lock.
        The number may be somebody else's file meanwhile.
        """
        if self._descriptor is None or self._path is None or is_at(self._descriptor, self._path):
            return self._descriptor
        try:
            self._descriptor = open_locked(self._path, os.O_WRONLY | os.O_APPEND | os.O_NOFOLLOW)
        except OSError:  # another process has taken it for the marker of a dead one
            return None
        redirect_crash_report(self._descriptor)
        return self._descriptor

    @contextlib.contextmanager
    def limited(self) -> Iterator[None]:
        """Inside `marked`: bound the block's duration and memory, as `GuardSettings` says.

        Without a marker there are no limits, because nothing would keep the next start from running into them.
        """
        descriptor = self._open_again()
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

    def _mark(self, phase: str, digest: str) -> tuple[Path, int, Marker] | None:
        marker = Marker(
            key=self._key.digest,
            model=self._model,
            backend=self._key["backend"],
            phase=phase,
            digest=digest,
            runtime=runtime_identity(),
            attempt=0,
            seconds=self._seconds,
            memory_mb=self._settings.guard.load_memory_mb,
            oom_kills=oom_kills(),
            time=_now(),
            host=platform.node(),
            pid=os.getpid(),
            thread=threading.get_ident(),
            boot=boot_id(),
            group=memory_group(),
            free=free_bytes(self._store) if phase == "build" else {},
        )
        before = [
            crash.marker.attempt + 1
            for crash in read_crash_records(self._store, self._key.digest)
            if crash.marker.same_work(marker)
        ]
        marker = msgspec.structs.replace(marker, attempt=max(before, default=0))
        reason: OSError | None = None
        for directory in writable_directories(self._store):
            try:
                return *write_marker(directory / MARKERS, self._key.digest, msgspec.json.encode(marker)), marker
            except OSError as error:
                reason = error
        self.problem = f"no crash guard: neither the store nor the temporary folder can be written ({reason})"
        return None


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())

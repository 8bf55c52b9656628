"""The crash guard: native code that ends the process is tried a bounded number of times, then quarantined.

Layout::

    <home>/guards/<key>.<random>   := header newline death?
    header                         := JSON object: `Marker` below
    death                          := what `faulthandler` wrote when the process ended: "Fatal Python error: ..." for
                                      SIGSEGV, SIGBUS, SIGABRT, SIGILL and SIGFPE, "Timeout (...)!" for the time limit,
                                      a bare stack for SIGTERM; nothing for SIGKILL and for exit() in native code

A process that builds or loads holds an exclusive `flock` on its marker, which the kernel releases when it dies, however
it dies; leaving the block removes the marker. What a dead process left is judged by the next start of the same key:

- a crash, the time limit, or a kill by the kernel for lack of memory: quarantined at once;
- SIGTERM: somebody ended it on purpose; forgotten;
- no trace: SIGKILL, which is what TorchServe sends when it scales down, stops, or has waited for startupTimeout. One
  such death is forgiven (two for a build). Processes that die together count as one: a marker's generation is above
  those of the dead that its process found. An attempt that succeeds, and a day, forgive them all. After more it is
  quarantined: whatever kills it, it is not tried for ever.

See docs/decisions/0007-crash-guard.md.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import logging
import os
import platform
import re
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from ts_handlers.errors import UNDECODABLE, QuarantinedError
from ts_handlers.fingerprint import runtime_identity
from ts_handlers.key import CacheKey
from ts_handlers.process_limits import bounded_memory, last_words, oom_kills, time_limit
from ts_handlers.settings import Settings
from ts_handlers.store.quarantine import (
    MARKERS,
    Quarantine,
    marker_paths,
    open_dead_marker,
    read_quarantines,
    writable_homes,
    write_quarantine,
)

if TYPE_CHECKING:
    import torch

    from ts_handlers.backends.base import Loaded

logger = logging.getLogger(__name__)

FORGIVEN = {"build": 2, "load": 1}
"""Deaths without a trace, one after the other, that are not yet a reason."""
AUTO_SECONDS = 120.0
FORGOTTEN_SECONDS = 24 * 3600.0
"""After this long a death without a trace counts no more."""


class Marker(msgspec.Struct, frozen=True):
    """What a process says before it runs native code."""

    key: str
    model: str
    backend: str
    phase: str
    seal: str
    runtime: dict[str, str]
    generation: int
    seconds: float | None
    memory_mb: int | None
    oom_kills: int | None
    time: str
    host: str
    pid: int

    def same_attempt(self, other: Marker) -> bool:
        """Whether two processes tried the same thing in the same runtime."""
        mine = (self.key, self.phase, self.seal, self.runtime)
        return mine == (other.key, other.phase, other.seal, other.runtime)


@dataclasses.dataclass(frozen=True)
class Death:
    """What a dead process left: its marker, its last words, and the time of its marker."""

    path: Path
    marker: Marker
    words: str
    began: float

    @property
    def is_forgotten(self) -> bool:
        """Whether it was so long ago that, without a reason, it says nothing."""
        return time.time() - self.began > FORGOTTEN_SECONDS

    @property
    def cause(self) -> tuple[str, str] | None:
        """Reason and stack; the reason is empty when it was asked to end. None when it left no trace."""
        memory = self.marker.memory_mb
        bounded = f", allocations bounded to {memory} MiB" if memory is not None and self.marker.phase == "load" else ""
        doing = {"build": "building", "load": "loading or warming up"}.get(self.marker.phase, self.marker.phase)
        if fatal := re.search(r"^Fatal Python error: ([^\n]*)\n*", self.words, re.MULTILINE):
            return f"{fatal[1]} while {doing}{bounded}", self.words[fatal.end() :]
        if timeout := re.search(r"^Timeout \([^)]*\)!\n*", self.words, re.MULTILINE):
            return f"{doing} took longer than {self.marker.seconds or 0:g} s", self.words[timeout.end() :]
        if self.words:
            return "", self.words
        before, now = self.marker.oom_kills, oom_kills()
        if before is not None and now is not None and now > before and self.marker.host == platform.node():
            return f"killed by the kernel for lack of memory while {doing}", ""
        return None


class Guard:
    """Guards one key of one store in this process.

    Parameters
    ----------
    root:
        The store's root.
    weights:
        Gives the digest of the weights; asked only when a record depends on it.

    Attributes
    ----------
    problem:
        Why no marker could be made, or None: the model is then served without a guard.
    """

    def __init__(self, root: Path, settings: Settings, key: CacheKey, model: str, weights: Callable[[], str]) -> None:
        self._root = root
        self._settings = settings
        self._key = key
        self._model = model
        self._weights = weights
        self._descriptor: int | None = None
        self._seconds: float | None = None
        self.problem: str | None = None

    @property
    def _canary(self) -> str:
        return f"tolerance={self._settings.canary.tolerance} seed={self._settings.canary.seed}"

    def refuse(self, seal: str = "") -> None:
        """Raise when the entry with this seal (empty: whatever is built) is quarantined; judges the dead first.

        Raises
        ------
        QuarantinedError
            With the reason and how to lift it.
        """
        judged = self._judge()
        for record in [*read_quarantines(self._root, self._key.digest), *judged]:
            if record.applies(seal, runtime_identity(), self._canary, self._weights):
                what = f"entry {self._key.digest}" if seal else f"building key {self._key.digest}"
                raise QuarantinedError(
                    f"{what} is quarantined since {record.time}: {record.reason}; it is tried again with another "
                    "torch, C or C++ library or driver, with a rebuilt entry, or after `ts-handlers unquarantine "
                    f"{self._key.digest[:12]} --store {self._root}`"
                )

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

    def limit(self, loaded: Loaded) -> Loaded:
        """The same artifact, each of its calls under `limited`."""

        def run(tensors: list[torch.Tensor]) -> Any:
            with self.limited():
                return loaded.run(tensors)

        return dataclasses.replace(loaded, run=run)

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
        for home in writable_homes(self._root):
            try:
                return *_write_marker(home / MARKERS, self._key.digest, msgspec.json.encode(marker)), marker
            except OSError as error:
                reason = error
        self.problem = f"no crash guard: neither the store nor the temporary folder can be written ({reason})"
        return None

    def _dead(self) -> list[Death]:
        """What dead processes left for this key."""
        found = []
        for path in marker_paths(self._root, self._key.digest):
            with contextlib.suppress(OSError), open_dead_marker(path) as descriptor:
                header, _, words = os.read(descriptor, 1 << 20).partition(b"\n")
                began = os.fstat(descriptor).st_mtime
                try:
                    marker = msgspec.json.decode(header, type=Marker)
                except UNDECODABLE:  # its process died, or is at this moment, between making and writing it
                    marker = None
                if marker is None or marker.key != self._key.digest:
                    if time.time() - began > FORGOTTEN_SECONDS:
                        path.unlink()
                    continue
                found.append(Death(path, marker, words.decode(errors="replace").strip()[:4000], began))
        return found

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


def _without_a_trace(times: int, phase: str) -> str:
    return (
        f"the process ended without a trace {times} times in a row in the phase {phase}, as by "
        "SIGKILL (out of memory, or startupTimeout too short) or by exit() in native code"
    )


def _write_marker(directory: Path, key: str, header: bytes) -> tuple[Path, int]:
    """Make a marker and lock it. Not flushed to the disk: a page cache outlives a process, and only that may die."""
    directory.mkdir(mode=0o700, exist_ok=True)
    path = directory / f"{key}.{uuid.uuid4().hex[:12]}"
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)  # a reader, who finds it empty and ignores it, holds it for a moment
        if os.write(descriptor, header + b"\n") != len(header) + 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    except OSError:
        os.close(descriptor)
        path.unlink(missing_ok=True)
        raise
    return path, descriptor


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())

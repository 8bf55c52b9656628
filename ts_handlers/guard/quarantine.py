"""Entries and builds that must not be tried again in this runtime, each with its reason.

Layout::

    <home>/quarantine/<key>-<identity>.json          what an entry did; one JSON object: `Quarantine` below
    <home>/quarantine/<key>-build-<identity>.json    what building under the key did; not read while there is an entry

The home is the store's root or, where that cannot be written, `fallback_home`. A record is written beside and renamed.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec

from ts_handlers.errors import UNDECODABLE
from ts_handlers.guard.state_directory import MARKERS, RECORDS, files_in, writable_directories
from ts_handlers.key.digests import digest_text
from ts_handlers.system.durations import span
from ts_handlers.system.files import open_locked, write_atomically

logger = logging.getLogger(__name__)

BUILD = "build-"
LONGEST_HOLD_SECONDS = 86400.0
"""No build that failed with an exception is held back for longer."""


class Quarantine(msgspec.Struct, frozen=True):
    """Why something is not tried again, and what exactly.

    Attributes
    ----------
    key, model, backend:
        Digest of the cache key, and two of the things behind it.
    phase:
        ``build``, ``load`` (load, canary or warm-up ended the process) or ``canary`` (wrong answers).
    seal:
        Seal of the entry's manifest; empty for whatever is built under this key.
    weights, canary:
        Digest of the weights and the canary's settings that the artifact failed with; empty when it fails with all.
    runtime:
        The libraries at hand, see `ts_handlers.key.fingerprint.runtime_identity`: with others it is tried again.
    reason, details:
        One line, and the Python stack of the moment where there is one.
    time, host, pid:
        When (UTC), where, and which process.
    kind:
        Empty when the record holds until it is lifted; for a build that failed with an exception what was at fault, see
        `ts_handlers.guard.failures`.
    count, failed_at, held_seconds, unbuildable:
        Of such a build: how often in a row, the last time in seconds since the epoch, how long it is not tried, and
        whether the exception was a `BuildError`.
    """

    key: str
    model: str
    backend: str
    phase: str
    seal: str
    runtime: dict[str, str]
    reason: str
    details: str = ""
    weights: str = ""
    canary: str = ""
    time: str = ""
    host: str = ""
    pid: int = 0
    kind: str = ""
    count: int = 1
    failed_at: float = 0.0
    held_seconds: float = 0.0
    unbuildable: bool = True

    def applies(self, seal: str, runtime: dict[str, str], canary: str, weights: Callable[[], str]) -> bool:
        """Whether an entry with this seal (empty: a build) is refused; `weights` is asked only if it matters."""
        if self.seal != seal or self.runtime != runtime or self.is_over:
            return False
        return not self.weights or (self.canary == canary and self.weights == weights())

    @property
    def is_over(self) -> bool:
        """Whether a failed build may be tried again; a clock that was set back makes it wait no longer than that."""
        return bool(self.kind) and abs(time.time() - self.failed_at) >= min(self.held_seconds, LONGEST_HOLD_SECONDS)

    @property
    def retry(self) -> str:
        """When it is tried again, in words."""
        if not self.kind:
            return "when lifted"
        if self.is_over:
            return "by the next start"
        return f"in {span(self.failed_at + self.held_seconds - time.time())}"

    @property
    def file_name(self) -> str:
        """Equal for records of the same thing, so that processes that find it out together write one file."""
        identity = "\n".join([self.phase, self.seal, self.weights, self.canary, str(sorted(self.runtime.items()))])
        return f"{self.key}-{'' if self.seal else BUILD}{digest_text(identity)[:12]}.json"


def write_quarantine(root: Path, record: Quarantine) -> bool:
    """Keep a record; False when neither the store nor the fallback folder can be written."""
    payload = msgspec.json.format(msgspec.json.encode(record), indent=1)
    for directory in writable_directories(root):
        path = directory / RECORDS / record.file_name
        try:
            path.parent.mkdir(mode=0o700, exist_ok=True)
            write_atomically(path, payload)
        except OSError as error:
            logger.debug("no quarantine record in %s: %s", directory, error)
            continue
        what = f"failed, tried again {record.retry}" if record.kind else "quarantined"
        logger.warning("%s: %s, %s of key %s: %s", what, record.model, record.phase, record.key, record.reason)
        return True
    return False


def read_quarantines(root: str | Path, key: str = "", *, builds: bool = True) -> list[Quarantine]:
    """The records of a store, oldest first.

    Parameters
    ----------
    key:
        Digest of a cache key, or the beginning of one; empty for all.
    builds:
        Whether to read also what says something about builds only.

    Examples
    --------
    >>> import tempfile
    >>> read_quarantines(tempfile.mkdtemp())
    []
    """
    return [record for _, record in quarantine_files(Path(root), key, builds=builds)]


def quarantine_files(root: Path, key: str = "", *, builds: bool = True) -> list[tuple[Path, Quarantine]]:
    """The same records with the files that hold them."""
    found = []
    for path in files_in(root, RECORDS, key):
        if not builds and f"-{BUILD}" in path.name:
            continue
        try:
            found.append((path, msgspec.json.decode(path.read_bytes(), type=Quarantine)))
        except FileNotFoundError:
            continue  # lifted meanwhile
        except (OSError, *UNDECODABLE) as error:
            logger.warning("the quarantine record %s cannot be read and is ignored: %s", path, error)
    return sorted(found, key=lambda each: each[1].time)


def lift_quarantine(root: str | Path, key: str) -> list[Quarantine]:
    """Remove the records of a key (or of all keys that begin so), with what dead processes left; returns the records.

    Raises
    ------
    OSError
        A record cannot be removed.
    """
    root = Path(root)
    lifted = read_quarantines(root, key)
    for path in files_in(root, RECORDS, key):
        path.unlink(missing_ok=True)
    for path in files_in(root, MARKERS, key):
        with contextlib.suppress(OSError), open_dead_marker(path):
            path.unlink()
    return lifted


@contextlib.contextmanager
def open_dead_marker(path: Path) -> Iterator[int]:
    """Open the marker of a dead process.

    The process that made it holds an exclusive lock on it as long as it lives; the shared lock taken here lets several
    readers find it dead at once.

    Raises
    ------
    OSError
        It is gone, or its process lives.
    """
    descriptor = open_locked(path, shared=True)
    try:
        yield descriptor
    finally:
        os.close(descriptor)

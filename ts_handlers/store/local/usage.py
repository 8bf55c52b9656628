"""Which entries are in use, and when an entry was used last.

In use: a reader holds a shared `flock` on the entry's manifest for as long as it may open or map the entry's files, and
whoever removes an entry first takes the exclusive lock without waiting. The kernel releases the locks of a process that
dies, however it dies. The lock belongs to the inode, so it holds across the rename that publishes an entry.

Who removes an entry holds its lock for one rename. One that is stopped in the middle of that (SIGSTOP, a frozen
container) must not cost every start a build: after a second readers go on without a lock. Should the entry go after
all, what they have opened and mapped stays theirs. What they open later is missing, and then they build, as they do
when an entry is damaged.

Last use: ``<root>/usage/<key>`` gets one byte for each use. Its size is the number of uses and its modification time
the last one; appending is atomic, so no process waits for another, and nothing is flushed. On a store that cannot be
written uses are not recorded. Access times are not consulted: many mounts do not keep them.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path

from ts_handlers.store.entry import MANIFEST
from ts_handlers.store.local.layout import USAGE
from ts_handlers.system.files import close_if_same, is_at, lock

logger = logging.getLogger(__name__)

ATTEMPTS = 100
RETRY_SECONDS = 0.01  # who holds the exclusive lock holds it for one rename


class InUse:
    """Shared locks of one reader; `close`, or the end of the process, gives them up."""

    def __init__(self) -> None:
        self._descriptors: dict[tuple[int, int], int] = {}

    def acquire(self, directory: Path) -> bool:
        """Lock the entry in `directory`; False when it is gone.

        Where the file system knows no locks this is True without one; nothing can be evicted there either. The same
        when somebody has held the lock for so long that it is not about to remove the entry but stopped.

        Raises
        ------
        OSError
            The manifest cannot be read.
        """
        path = directory / MANIFEST
        for attempt in range(ATTEMPTS):
            try:
                descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
            except (FileNotFoundError, NotADirectoryError):
                return False
            try:
                lock(descriptor, path, shared=True)
            except BlockingIOError:
                if attempt + 1 < ATTEMPTS:
                    os.close(descriptor)
                    time.sleep(RETRY_SECONDS)
                    continue
                logger.warning("%s is held by a process that does not go on; reading it without a lock", directory)
            except OSError:
                pass  # no locks here, or the entry has gone, see below
            if is_at(descriptor, path):
                status = os.fstat(descriptor)
                held = self._descriptors.setdefault((status.st_dev, status.st_ino), descriptor)
                if held != descriptor:
                    os.close(descriptor)
                return True
            os.close(descriptor)  # removed or replaced between opening and locking
        return False

    def holds(self, directory: Path) -> bool:
        """Whether the entry in `directory` is still the one that was acquired."""
        try:
            status = os.stat(directory / MANIFEST)
        except OSError:
            return False
        return (status.st_dev, status.st_ino) in self._descriptors

    def release(self, directory: Path) -> None:
        """Give up the lock on the entry in `directory`, if there is one."""
        with contextlib.suppress(OSError):
            status = os.stat(directory / MANIFEST)
            descriptor = self._descriptors.pop((status.st_dev, status.st_ino), None)
            if descriptor is not None:
                close_if_same(descriptor, status)

    def close(self) -> None:
        """Give up every lock."""
        while self._descriptors:
            identity, descriptor = self._descriptors.popitem()
            close_if_same(descriptor, identity)


@contextlib.contextmanager
def exclusive(directory: Path) -> Iterator[str | None]:
    """Lock an entry against every reader, without waiting; yields None, or the reason why it cannot be locked.

    Raises
    ------
    FileNotFoundError
        The entry is gone.
    """
    path = directory / MANIFEST
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    except FileNotFoundError:
        path = directory  # never complete, or half-removed: nobody reads it
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        try:
            lock(descriptor, path)
        except BlockingIOError:
            yield "in use"
            return
        except FileNotFoundError:
            raise
        except OSError as error:
            yield f"cannot be locked: {error.strerror}"
            return
        yield None
    finally:
        os.close(descriptor)


def in_use(directory: Path) -> bool:
    """Whether a process reads this entry now; True also where that cannot be told."""
    try:
        with exclusive(directory) as refusal:
            return refusal is not None
    except FileNotFoundError:
        return False
    except OSError:
        return True


def record_use(root: Path, key: str) -> None:
    """Remember that an entry was used now."""
    path = root / USAGE / key
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT
    with contextlib.suppress(OSError):
        try:
            descriptor = os.open(path, flags, 0o600)
        except FileNotFoundError:
            path.parent.mkdir(mode=0o700, exist_ok=True)
            descriptor = os.open(path, flags, 0o600)
        try:
            os.write(descriptor, b".")
        finally:
            os.close(descriptor)


def touch_use(root: Path, key: str) -> None:
    """Remember that an entry is still in use, without counting a use."""
    path = root / USAGE / key
    with contextlib.suppress(OSError):
        if not path.exists():
            path.parent.mkdir(mode=0o700, exist_ok=True)
            path.touch(mode=0o600)
        os.utime(path)


def read_use(root: Path, key: str) -> tuple[float | None, int]:
    """Time of the last use in seconds since the epoch (None: never) and the number of uses."""
    try:
        status = (root / USAGE / key).stat()
    except OSError:
        return None, 0
    return status.st_mtime, status.st_size

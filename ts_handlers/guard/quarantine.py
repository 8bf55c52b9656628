"""Reading, writing and lifting the records of what is not tried again."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path

from ts_handlers.errors import UNDECODABLE
from ts_handlers.guard.records import BUILD, Quarantine, Record, decode_record, encode_record
from ts_handlers.guard.state_directory import MARKERS, RECORDS, files_in, writable_directories
from ts_handlers.system.files import open_locked, write_atomically

logger = logging.getLogger(__name__)


def write_record(store: Path, record: Record) -> bool:
    """Keep a record; False when neither the store nor the fallback directory can be written."""
    for directory in writable_directories(store):
        path = directory / RECORDS / record.file_name
        try:
            path.parent.mkdir(mode=0o700, exist_ok=True)
            write_atomically(path, encode_record(record))
        except OSError as error:
            logger.debug("no quarantine record in %s: %s", directory, error)
            continue
        what = "quarantined" if isinstance(record, Quarantine) else f"failed, tried again {record.retry}"
        logger.warning("%s: %s, %s of key %s: %s", what, record.model, record.phase, record.key, record.reason)
        return True
    return False


def read_quarantines(store: str | Path, key: str = "", *, builds: bool = True) -> list[Record]:
    """The records of a store, oldest first.

    Parameters
    ----------
    store:
        The store's folder on this host.
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
    return [record for _, record in record_files(Path(store), key, builds=builds)]


def record_files(store: Path, key: str = "", *, builds: bool = True) -> list[tuple[Path, Record]]:
    """The same records with the files that hold them."""
    found = []
    for path in files_in(store, RECORDS, key):
        if not builds and f"-{BUILD}" in path.name:
            continue
        try:
            found.append((path, decode_record(path.read_bytes())))
        except FileNotFoundError:
            continue  # lifted meanwhile
        except (OSError, *UNDECODABLE) as error:
            logger.warning("the quarantine record %s cannot be read and is ignored: %s", path, error)
    return sorted(found, key=lambda each: each[1].time)


def lift_quarantine(store: str | Path, key: str) -> list[Record]:
    """Remove the records of a key (or of all keys that begin so), with what dead processes left; returns the records.

    Raises
    ------
    OSError
        A record cannot be removed.
    """
    store = Path(store)
    lifted = read_quarantines(store, key)
    for path in files_in(store, RECORDS, key):
        path.unlink(missing_ok=True)
    for path in files_in(store, MARKERS, key):
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

"""Garbage in a store: what crashes and evictions leave behind is found first and removed afterwards.

Everything here may be removed at any moment without harm, whatever other processes do; ages keep apart what has been
forgotten from what is just being made. Quarantine records are never garbage, those of failed builds are some day.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from ts_handlers.guard.quarantine import record_files
from ts_handlers.guard.records import LONGEST_HOLD_SECONDS, FailedBuild
from ts_handlers.store.canaries import last_use
from ts_handlers.store.entry import MANIFEST
from ts_handlers.store.local.layout import (
    BACKGROUND,
    CANARIES,
    EVICTED,
    FETCH_LOCK,
    LEASE_LOCK,
    LEASE_STATUS,
    LEASES,
    MARKERS,
    OBSERVED,
    OUTCOME,
    OUTSIDE,
    RECORDS,
    REMOTE,
    SHARED,
    STAGING,
    UNSENT,
    USAGE,
    VERIFIED,
)
from ts_handlers.store.local.verified import REHASH_SECONDS, read_record
from ts_handlers.store.upkeep.eviction import remove_entry
from ts_handlers.store.upkeep.scan import measure, scan_entries, scan_trash
from ts_handlers.system.files import is_temporary, open_locked

ORPHAN_SECONDS = 86400.0  # records of keys that have no entry; a new build of the key would use them again
OBSERVED_SECONDS = 90 * 86400.0  # what is known of calls; seeing them again takes traffic
MARKER_SECONDS = 7 * 86400.0  # crash markers, from which the next start of the key would learn
DAMAGED_SECONDS = 7 * 86400.0  # damaged entries, kept for whoever wants to know what happened

CANARIES_PER_KEY = 64  # one for each of the weights that were served lately; others are recorded again when needed

_LEASE = rf"(?P<lease>(?P<key>[0-9a-f]{{32}})({re.escape(BACKGROUND)})?)"
_LEASE_FILE = re.compile(
    _LEASE + r"(\.[0-9a-f]{16})?" + f"({'|'.join(map(re.escape, (FETCH_LOCK, LEASE_LOCK, LEASE_STATUS, OUTCOME)))})"
)
# Of versions that named temporary files ``<name>.<process>``, without the leading dot.
_OLD_LEASE_TEMPORARY = re.compile(_LEASE + rf"({'|'.join(map(re.escape, (LEASE_STATUS, OUTCOME)))})\.\w+")


@dataclasses.dataclass(frozen=True)
class Garbage:
    """One file or folder that is to go, and why; `remove` returns None when it is gone, otherwise why it is not."""

    path: Path
    bytes: int
    inodes: int
    reason: str
    remove: Callable[[], str | None]


def find_garbage(root: Path, now: float | None = None) -> list[Garbage]:
    """Everything in the store that nobody needs any more; `now` is in seconds since the epoch."""
    now = time.time() if now is None else now
    entries = scan_entries(root)
    keys = {entry.key for entry in entries}
    bases = {entry.manifest.cache_key.base.digest for entry in entries if entry.manifest is not None}
    found = [
        Garbage(path, *measure(path), reason, functools.partial(_remove, path, locked))
        for path, locked, reason in (*_unfinished(root, now), *_orphans(root, keys, bases, now), *_surplus(root))
        if locked is None or not _is_locked(locked)
    ]
    for entry in entries:
        if not (entry.directory / MANIFEST).exists():
            reason = "no manifest: it was never complete"
            remove = functools.partial(remove_entry, root, entry.directory)
            found.append(Garbage(entry.directory, entry.bytes, entry.inodes, reason, remove))
    return found


Found = tuple[Path, Path | None, str]  # what to remove, what its owner would hold locked, why


def _unfinished(root: Path, now: float) -> Iterator[Found]:
    """What interrupted work has left."""
    for item in scan_trash(root):
        if item.name.startswith(EVICTED):
            yield item.path, None, "left by an eviction that did not finish"
        elif now - item.modified > DAMAGED_SECONDS:
            yield item.path, None, f"damaged, moved aside {(now - item.modified) / 86400:.0f} days ago"
    for path in _children(root / STAGING):
        yield path, path, "left by a builder that died"
    for path in _temporary_files(root):
        if _is_older(path, ORPHAN_SECONDS, now):
            yield path, None, "a temporary file left by a process that died"


def _orphans(root: Path, keys: set[str], bases: set[str], now: float) -> Iterator[Found]:
    """Records of what does not exist any more."""
    for folder in (CANARIES, USAGE):
        for path in _children(root / folder):
            if path.name not in keys and _is_older(path, ORPHAN_SECONDS, now):
                yield path, None, f"{folder}: its key has no entry"
    for path in _children(root / OUTSIDE):
        if path.name not in bases and _is_older(path, ORPHAN_SECONDS, now):
            yield path, None, "outside: no entry of its model is left"
    for path in _children(root / OBSERVED):
        if _is_older(path, OBSERVED_SECONDS, now):
            yield path, None, "observed: no start of its model has asked for it for long"
    for path in _children(root / REMOTE):
        key = path.name.partition(".")[0].removeprefix(UNSENT)
        if path.name.startswith(UNSENT) and key not in keys and _is_older(path, ORPHAN_SECONDS, now):
            yield path, None, "remote: its key has no entry"
    for path in _children(root / LEASES):
        match = _LEASE_FILE.fullmatch(path.name)
        if match and match["key"] not in keys and _is_older(path, ORPHAN_SECONDS, now):
            yield path, path.with_name(f"{match['lease']}{LEASE_LOCK}"), "leases: its key has no entry"
    for path in _children(root / MARKERS):
        if path.name.partition(".")[0] not in keys and _is_older(path, MARKER_SECONDS, now):
            yield path, path, "guards: left by a process that died long ago, and its key has no entry"
    for path, record in record_files(root):
        if isinstance(record, FailedBuild) and _is_older(path, LONGEST_HOLD_SECONDS + MARKER_SECONDS, now):
            yield path, None, "quarantine: a build that failed long ago"
    for path in _children(root / VERIFIED):
        known = read_record(path)
        gone = known is None or not os.path.exists(known.subject)
        if _is_older(path, ORPHAN_SECONDS if gone else REHASH_SECONDS, now):
            yield path, None, "digests of files that are gone, or too old to be used"


def _surplus(root: Path) -> Iterator[Found]:
    """Canary records of weights that have not been served for the longest time."""
    for folder in _children(root / CANARIES):
        records = [path for path in _children(folder) if not is_temporary(path.name)]
        if len(records) > CANARIES_PER_KEY:
            for path in sorted(records, key=last_use)[:-CANARIES_PER_KEY]:
                yield path, None, f"canaries: its key has {CANARIES_PER_KEY} that were used since"


def _remove(path: Path, locked: Path | None) -> str | None:
    try:
        with _lock(locked) as held:
            if not held:
                return "in use"
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                # A lease's lock file goes while it is held: who has opened it before and locks it afterwards finds
                # that it has no name any more and opens a new one.
                path.unlink()
    except FileNotFoundError:
        return None
    except OSError as error:
        return f"cannot be removed: {error.strerror or error}"
    return None


@contextlib.contextmanager
def _lock(path: Path | None) -> Iterator[bool]:
    """Hold the lock that the owner of a file or folder would hold, without waiting; yields whether it is held."""
    if path is None or not path.exists():
        yield True
        return
    try:
        descriptor = open_locked(path)
    except BlockingIOError:
        yield False
        return
    try:
        yield True
    finally:
        os.close(descriptor)


def _is_locked(path: Path) -> bool:
    try:
        with _lock(path) as held:
            return not held
    except OSError:
        return True


def _temporary_files(root: Path) -> Iterator[Path]:
    """Files written beside their target and never renamed into place."""
    for folder in (
        *_children(root / CANARIES),
        *_children(root / OUTSIDE),
        *_children(root / OBSERVED),
        *_children(root / SHARED),
        root / LEASES,
        root / REMOTE,
        root / RECORDS,
    ):
        yield from (path for path in _children(folder) if is_temporary(path.name))
    yield from (path for path in _children(root / LEASES) if _OLD_LEASE_TEMPORARY.fullmatch(path.name))


def _children(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError:
        return []


def _is_older(path: Path, seconds: float, now: float) -> bool:
    try:
        return now - path.stat().st_mtime > seconds
    except OSError:
        return False

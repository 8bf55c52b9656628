"""Checking every byte of a store, whatever was remembered about it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

from ts_handlers.store.canaries import check_canary_bytes
from ts_handlers.store.entry import read_manifest, verify_files
from ts_handlers.store.local.layout import CANARIES
from ts_handlers.store.local.trash import move_aside
from ts_handlers.store.local.usage import InUse, exclusive
from ts_handlers.store.local.verified import KnownDigests
from ts_handlers.store.upkeep.scan import EntryInfo, canaries_of, folders_below, measure, scan_entries

GONE = "gone"
GONE_MEANWHILE = "gone meanwhile"


@dataclasses.dataclass(frozen=True)
class Finding:
    """One thing that was checked.

    `problem` is None when it is as it was written. `action` says what was done about a problem: ``moved aside``, or why
    nothing was.
    """

    kind: str  # "entry" or "canary"
    path: Path
    key: str
    model: str | None
    bytes: int
    problem: str | None
    action: str | None = None


def audit(root: Path, *, repair: bool = False) -> Iterator[Finding]:
    """Check every entry and canary; with `repair`, move damaged ones into the trash.

    An entry that a living process reads stays where it is, because moving it would pull files from under that process;
    the process's next start moves it aside. A repaired key is built again by the next start that needs it.
    """
    keys = set()
    for entry in scan_entries(root):
        problem = check_entry(root, entry)
        if problem == GONE:
            continue
        keys.add(entry.key)
        action = _repair_entry(root, entry.directory, problem) if problem is not None and repair else None
        yield Finding("entry", entry.directory, entry.key, entry.model, entry.bytes, problem, action)
    for folder in folders_below(root / CANARIES, 1):
        for path in canaries_of(root, folder.name):
            size, problem = measure(path)[0], _check_canary(path, path)
            if problem == GONE:
                continue
            action = _repair_canary(root, path, problem) if problem is not None and repair else None
            yield Finding("canary", path, folder.name, None, size, problem, action)


def check_entry(root: Path, entry: EntryInfo) -> str | None:
    """What is wrong with an entry, by hashing all of it; `GONE` when it has been removed meanwhile."""
    reader = InUse()
    try:
        if entry.problem is not None:
            return entry.problem if entry.directory.exists() else GONE
        if not reader.acquire(entry.directory):
            return GONE
        known = KnownDigests(root, entry.directory)
        verify_files(entry.directory, read_manifest(entry.directory), known.compute)
        known.save()
    except (OSError, ValueError) as error:
        return str(error)
    finally:
        reader.close()
    return None


def _check_canary(path: Path, place: Path) -> str | None:
    """What is wrong with a canary record whose place in the store is, or was, `place`."""
    try:
        check_canary_bytes(f"{place.parent.name}/{place.name}", path.read_bytes())
    except FileNotFoundError:
        return GONE
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    except ValueError as error:
        return str(error)
    return None


def _is_damaged(moved: Path, key: str) -> bool:
    """Whether an entry that has been moved aside is indeed damaged: another process may have replaced it before."""
    try:
        manifest = read_manifest(moved)
        verify_files(moved, manifest)
    except (OSError, ValueError):
        return True
    return manifest.cache_key.digest != key


def _repair_entry(root: Path, directory: Path, problem: str) -> str:
    try:
        with exclusive(directory) as refusal:
            return refusal or _repair(root, directory, problem, lambda moved: _is_damaged(moved, directory.name))
    except FileNotFoundError:
        return GONE_MEANWHILE
    except OSError as error:
        return f"cannot be locked: {error.strerror or error}"


def _repair_canary(root: Path, path: Path, problem: str) -> str:
    return _repair(root, path, problem, lambda moved: _check_canary(moved, path) is not None)


def _repair(root: Path, path: Path, problem: str, is_it: Callable[[Path], bool]) -> str:
    try:
        move_aside(root, path, problem, is_it)
    except FileNotFoundError:
        return GONE_MEANWHILE
    except OSError as error:
        return f"cannot be moved aside: {error.strerror or error}"
    return "moved aside"

"""Checking every byte of a store, whatever was remembered about it."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator
from pathlib import Path

from ts_handlers.store.entry import read_manifest, verify_files
from ts_handlers.store.scan import EntryInfo, canaries_of, measure, scan_entries
from ts_handlers.store.trash import move_aside
from ts_handlers.store.usage import InUse, exclusive
from ts_handlers.store.verified import KnownDigests

GONE = "gone"


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
    for folder in sorted(path for path in (root / "canaries").glob("*") if path.is_dir()):
        for path in canaries_of(root, folder.name):
            size, problem = measure(path)[0], _check_canary(path)
            if problem == GONE:
                continue
            action = _repair(root, path, problem) if problem is not None and repair else None
            yield Finding("canary", path, folder.name, None, size, problem, action)


def check_entry(root: Path, entry: EntryInfo) -> str | None:
    """What is wrong with an entry, by hashing all of it; `GONE` when it has been removed meanwhile."""
    reader = InUse()
    try:
        if entry.problem is not None:
            return entry.problem if entry.directory.exists() else GONE
        if not reader.acquire(entry.directory):
            return GONE
        manifest = read_manifest(entry.directory)
        known = KnownDigests(root, entry.directory)
        verify_files(entry.directory, manifest, known.compute)
        known.save()
    except (OSError, ValueError) as error:
        return str(error)
    finally:
        reader.close()
    return None


def _check_canary(path: Path) -> str | None:
    try:
        digest, _, payload = path.read_bytes().partition(b"\n")
    except FileNotFoundError:
        return GONE
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    return None if hashlib.sha256(payload).hexdigest().encode() == digest else "its digest differs from its content"


def _repair_entry(root: Path, directory: Path, problem: str) -> str:
    try:
        with exclusive(directory) as refusal:
            return refusal or _repair(root, directory, problem)
    except FileNotFoundError:
        return "gone meanwhile"


def _repair(root: Path, path: Path, problem: str) -> str:
    try:
        move_aside(root, path, problem)
    except OSError as error:
        return f"cannot be moved aside: {error.strerror or error}"
    return "moved aside"

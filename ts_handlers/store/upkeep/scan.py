"""Scanning a store: a report of what lies in it, which changes nothing and never fails because of what it finds.

Digests are not computed here, so that a scan of a large store takes milliseconds.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from ts_handlers.store.entry import Manifest, read_manifest
from ts_handlers.store.local.layout import CANARIES, ENTRIES, ENTRY_DEPTH, REASON, TRASH
from ts_handlers.store.local.pins import is_pinned
from ts_handlers.store.local.usage import read_use
from ts_handlers.system.files import is_temporary


@dataclasses.dataclass(frozen=True)
class EntryInfo:
    """One entry as it was found.

    `bytes` is the size of its files, `inodes` counts files and directories; both include the canaries of its key. Times
    are seconds since the epoch; `last_used` is None when no use was recorded. `problem` says why the state is not
    ``ok``.
    """

    directory: Path
    model: str
    device: str
    key: str
    manifest: Manifest | None
    problem: str | None
    bytes: int
    inodes: int
    published: float
    last_used: float | None
    uses: int
    pinned: bool

    @property
    def backend(self) -> str:
        """Name of the backend that built it, or ``?``."""
        return "?" if self.manifest is None else self.manifest.backend

    @property
    def state(self) -> str:
        """``ok`` or ``damaged``."""
        return "ok" if self.problem is None else "damaged"


@dataclasses.dataclass(frozen=True)
class TrashInfo:
    """An entry that was moved aside."""

    path: Path
    reason: str | None
    bytes: int
    inodes: int
    modified: float

    @property
    def name(self) -> str:
        """Its folder's name, which begins with the key."""
        return self.path.name


def scan_entries(root: Path) -> list[EntryInfo]:
    """Every entry of the store, by model and key."""
    infos = []
    for directory in entry_folders(root):
        info = scan_entry(root, directory)
        if info is not None:
            infos.append(info)
    return infos


def entry_folders(root: Path) -> Iterator[Path]:
    """The folder of every entry; those that vanish meanwhile are left out."""
    return folders_below(root / ENTRIES, ENTRY_DEPTH)


def scan_entry(root: Path, directory: Path) -> EntryInfo | None:
    """One entry, or None when it is gone."""
    manifest, problem, published = None, None, 0.0
    try:
        published = directory.stat().st_mtime
        manifest = read_manifest(directory)
        if manifest.cache_key.digest != directory.name:
            problem = "the manifest's key is another one than its folder's"
    except FileNotFoundError:
        if not os.path.lexists(directory):
            return None
        problem = "no manifest"
    except (OSError, ValueError) as error:
        problem = str(error)
    size, inodes = measure(directory)
    canary_size, canary_inodes = measure(root / CANARIES / directory.name)
    last_used, uses = read_use(root, directory.name)
    return EntryInfo(
        directory=directory,
        model=directory.parts[-4],
        device=directory.parts[-2],
        key=directory.name,
        manifest=manifest,
        problem=problem,
        bytes=size + canary_size,
        inodes=inodes + canary_inodes,
        published=published,
        last_used=last_used,
        uses=uses,
        pinned=is_pinned(root, directory.name),
    )


def scan_trash(root: Path) -> list[TrashInfo]:
    """Everything that was moved aside and not yet removed."""
    infos = []
    for path in folders_below(root / TRASH, 1):
        reason = None
        with contextlib.suppress(OSError):
            modified = path.stat().st_mtime
            with contextlib.suppress(FileNotFoundError):
                reason = (path / REASON).read_text(errors="replace").strip()
            infos.append(TrashInfo(path, reason, *measure(path), modified))
    return infos


def canaries_of(root: Path, key: str) -> list[Path]:
    """The canary records of a key."""
    with contextlib.suppress(OSError):
        return sorted(path for path in (root / CANARIES / key).iterdir() if not is_temporary(path.name))
    return []


def measure(path: Path) -> tuple[int, int]:
    """Bytes of the files at or below a path, and how many files and directories there are; zeros when it is gone."""
    size, inodes = 0, 0
    pending = [os.fspath(path)]
    while pending:
        current = pending.pop()
        with contextlib.suppress(OSError):
            status = os.lstat(current)
            inodes += 1
            if not stat.S_ISDIR(status.st_mode):
                size += status.st_size
                continue
            pending.extend(entry.path for entry in os.scandir(current))
    return size, inodes


def folders_below(base: Path, depth: int) -> Iterator[Path]:
    """Folders exactly `depth` levels below `base`, in order; what cannot be read is left out."""
    try:
        with os.scandir(base) as found:
            names = sorted(item.name for item in found if item.is_dir(follow_symlinks=False))
    except OSError:
        return
    for name in names:
        if depth == 1:
            yield base / name
        else:
            yield from folders_below(base / name, depth - 1)

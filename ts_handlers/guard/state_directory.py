"""Where the crash guard keeps its files.

That is the folder of the store or, where the store cannot be written, a folder of this user below the temporary one.
Both are called state directories here, and each of them holds the same two folders::

    <state directory>/guards/        markers, see `ts_handlers.guard.markers`
    <state directory>/quarantine/    records, see `ts_handlers.guard.records`
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from ts_handlers.key.digests import digest_text
from ts_handlers.system.files import is_temporary
from ts_handlers.system.ownership import is_private_folder

MARKERS = "guards"
RECORDS = "quarantine"


def fallback_directory(store: Path) -> Path:
    """The state directory for a store that cannot be written: a folder of this user and this store."""
    name = digest_text(str(store))[:12]
    return Path(tempfile.gettempdir()) / f"ts_handlers-guard-{os.geteuid()}" / name


def existing_directories(store: Path) -> list[Path]:
    """The state directories of a store that may hold something, as far as they can be trusted."""
    fallback = fallback_directory(store)
    return [store, fallback] if is_private_folder(fallback.parent) else [store]


def writable_directories(store: Path) -> Iterator[Path]:
    """The same folders, in the order in which they are tried; the fallback is made if it does not exist."""
    yield store
    fallback = fallback_directory(store)
    with contextlib.suppress(OSError):
        fallback.parent.mkdir(mode=0o700, exist_ok=True)
        if is_private_folder(fallback.parent):
            fallback.mkdir(mode=0o700, exist_ok=True)
            yield fallback


def files_in(store: Path, folder: str, key: str = "") -> list[Path]:
    """Files in one folder of every state directory of a store, whose names begin with `key`."""
    found = []
    for directory in existing_directories(store):
        with contextlib.suppress(OSError):
            names = sorted(os.listdir(directory / folder))
            found += [directory / folder / name for name in names if name.startswith(key) and not is_temporary(name)]
    return found

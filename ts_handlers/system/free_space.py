"""Room on the disks that a build fills: that of the store and that of the temporary folder."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

FULL_BYTES = 1 << 20
"""A disk with less free space than this is full: compilers write their files in larger parts."""


def free_bytes(store: Path) -> dict[str, int]:
    """Free bytes by folder: of the store, and of the temporary folder; what cannot be asked is left out.

    Examples
    --------
    >>> all(count >= 0 for count in free_bytes(Path("/")).values())
    True
    """
    found = {}
    for folder in (store, Path(tempfile.gettempdir())):
        with contextlib.suppress(OSError):
            found[str(folder)] = shutil.disk_usage(folder).free
    return found


def full_folder(*measured: Mapping[str, int]) -> tuple[str, int] | None:
    """The folder with the least free space in any of several measurements, if its disk is full; None when none is.

    Examples
    --------
    >>> full_folder({"/store": 4096, "/tmp": 10**9}, {"/store": 10**9})
    ('/store', 4096)
    >>> full_folder({"/tmp": 10**9})
    """
    free, folder = min(((free, folder) for each in measured for folder, free in each.items()), default=(FULL_BYTES, ""))
    return (folder, free) if free < FULL_BYTES else None


def has_more_room(before: Mapping[str, int]) -> bool:
    """Whether folders in which something did not fit have at least twice the space now that they had, and `FULL_BYTES`.

    Parameters
    ----------
    before:
        The folders that were too small, with their free bytes then.

    Examples
    --------
    >>> has_more_room({"/": 1}), has_more_room({"/": 10**18}), has_more_room({})
    (True, False, False)
    """
    if not before:
        return False
    try:
        return all(shutil.disk_usage(folder).free >= 2 * free + FULL_BYTES for folder, free in before.items())
    except OSError:
        return False

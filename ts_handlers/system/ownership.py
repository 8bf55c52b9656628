"""Whether others could put something into a folder, or replace a file: by owner and mode."""

from __future__ import annotations

import os
import stat
from pathlib import Path


def is_ours_or_roots(status: os.stat_result) -> bool:
    """Whether a file or folder belongs to this process's user, or to root, who can do everything anyway."""
    return status.st_uid in (os.geteuid(), 0)


def others_may_write(status: os.stat_result) -> bool:
    """Whether the mode lets the group or everybody write."""
    return bool(status.st_mode & (stat.S_IWGRP | stat.S_IWOTH))


def only_we_write(status: os.stat_result) -> bool:
    """Whether nobody but this user and root can write a file, or make and replace files in a folder."""
    return is_ours_or_roots(status) and not others_may_write(status)


def is_private_folder(path: Path, *, or_roots: bool = False) -> bool:
    """Whether `path` is a folder of this user that nobody else writes; a symbolic link is none.

    For a folder at a well-known place in the temporary folder, where everybody could have made it first.

    Parameters
    ----------
    or_roots:
        Whether a folder of root will do too.
    """
    try:
        status = os.lstat(path)
    except OSError:
        return False
    ours = is_ours_or_roots(status) if or_roots else status.st_uid == os.geteuid()
    return stat.S_ISDIR(status.st_mode) and ours and not others_may_write(status)

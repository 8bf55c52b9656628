"""The store's trash: moving a damaged entry or record there, with the reason."""

from __future__ import annotations

import contextlib
import errno
import os
import uuid
from collections.abc import Callable
from pathlib import Path

from ts_handlers.store.local.layout import REASON, TRASH


def move_aside(root: Path, path: Path, reason: str, is_it: Callable[[Path], bool] = lambda moved: True) -> Path:
    """Rename an entry's folder, or one file, into the trash; from then on it is not found.

    Parameters
    ----------
    is_it:
        Asked when it has been moved, because another process may have replaced it a moment before; what `is_it` does
        not recognise is put back.

    Returns
    -------
    The folder in the trash, whose ``reason.txt`` holds the reason.

    Raises
    ------
    OSError
        It is gone or has been replaced (`FileNotFoundError`), or the store cannot be written.
    """
    name = path.name if path.is_dir() else path.parent.name  # a canary lies in the folder of its key
    trash = root / TRASH / f"{name}-{uuid.uuid4().hex[:8]}"
    trash.parent.mkdir(mode=0o700, exist_ok=True)
    moved = trash
    if path.is_symlink() or not path.is_dir():
        trash.mkdir(mode=0o700)
        moved = trash / path.name
    try:
        os.rename(path, moved)
        if not is_it(moved):
            os.rename(moved, path)
            raise FileNotFoundError(errno.ENOENT, "it has been replaced", os.fspath(path))
    except OSError:
        if moved != trash:
            with contextlib.suppress(OSError):
                trash.rmdir()
        raise
    (trash / REASON).write_text(reason + "\n")
    return trash

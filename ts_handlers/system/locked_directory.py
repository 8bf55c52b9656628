"""Directories that belong to a living process: locked while it lives, collected by others when it has died.

The lock is a `flock` on the directory itself, which the kernel releases when the holder dies, however it dies.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import tempfile
from pathlib import Path

from ts_handlers.system.files import lock

logger = logging.getLogger(__name__)


def make_locked_directory(parent: Path, prefix: str) -> tuple[Path, int]:
    """Make a private directory and lock it.

    Returns
    -------
    The directory, and the descriptor that holds the lock: closing it, or dying, gives the directory free.
    """
    while True:
        directory = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))  # mode 0700
        try:
            descriptor = os.open(directory, os.O_RDONLY)
        except FileNotFoundError:
            continue
        try:
            lock(descriptor, directory, wait=True)
        except FileNotFoundError:  # a collector has come between making and locking it
            os.close(descriptor)
        except OSError:
            os.close(descriptor)
            shutil.rmtree(directory, ignore_errors=True)
            raise
        else:
            return directory, descriptor


def collect_directories(parent: Path, pattern: str = "*") -> None:
    """Remove this user's directories whose lock nobody holds."""
    for path in parent.glob(pattern):
        with contextlib.suppress(OSError):
            descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                if os.fstat(descriptor).st_uid == os.geteuid():
                    lock(descriptor, path)
                    logger.info("collecting %s, left by a process that died", path.name)
                    shutil.rmtree(path, ignore_errors=True)
            finally:
                os.close(descriptor)


def empty_folder(directory: Path) -> None:
    """Remove everything inside a directory, which stays."""
    for path in directory.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()

"""The folder of this user in the temporary folder, which nobody else can enter, whoever made its usual name first.

Usually that is ``ts_handlers-<uid>``. Where the name is somebody else's, or was open to others, it is the oldest folder
``ts_handlers-<uid>-<time>-<random>`` of this user; the first process that finds none makes it.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import stat
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from ts_handlers.errors import StoreError

logger = logging.getLogger(__name__)

LOCK_SECONDS = 5.0
"""For how long another user may keep the temporary folder locked; two folders are then the worst that comes of it."""


def private_folder() -> Path:
    """The folder; made if there is none.

    Raises
    ------
    StoreError
        The temporary folder takes no folder.
    """
    temporary = Path(tempfile.gettempdir())
    usual = temporary / f"ts_handlers-{os.geteuid()}"
    try:
        with contextlib.suppress(FileExistsError):
            usual.mkdir(mode=0o700)
        if is_closed_to_others(usual):
            return usual
        with _locked(temporary):
            return _own(temporary, usual) or _made(temporary, usual)
    except OSError as error:
        raise StoreError(
            f"no private folder can be made in {temporary}, where workers meet with `across_workers`: {error}; set "
            "TMPDIR to a folder that can be written"
        ) from error


def is_closed_to_others(path: Path) -> bool:
    """Whether `path` is a folder of this user with mode 0700; a symbolic link is none."""
    try:
        status = path.lstat()
    except OSError:
        return False
    return stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid() and not status.st_mode & 0o077


def _own(temporary: Path, usual: Path) -> Path | None:
    return next(filter(is_closed_to_others, sorted(temporary.glob(f"{usual.name}-*"))), None)


def _made(temporary: Path, usual: Path) -> Path:
    made = temporary / f"{usual.name}-{time.time_ns():020}-{os.urandom(6).hex()}"
    made.mkdir(mode=0o700)
    logger.warning(
        "%s is not a folder of uid %d with mode 0700, so whoever can write there could take the model process's place; "
        "%s is used",
        *(usual, os.geteuid(), made),
    )
    return made


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Let no other process look for such a folder, and make one, meanwhile."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        deadline = time.monotonic() + LOCK_SECONDS
        while time.monotonic() < deadline:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError:
                time.sleep(0.02)
        yield
    finally:
        os.close(descriptor)

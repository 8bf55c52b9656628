"""The folder in which the workers of one model find its process: socket, lock and status.

``<temporary folder>/ts_handlers-<uid>/<digest>/``, private to the user, where the digest tells apart models, devices,
settings, and the servers whose workers share::

    socket    the model process listens here while it serves
    lock      held by `flock` from before the process starts until it has ended, however it ends
    status    JSON: {"pid", "phase", "estimate", "error": {"type", "message"} | null}

The lock is a file that only its holder removes, so it is taken as `flock` on the file that is there afterwards.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import socket
import stat
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec

from ts_handlers.errors import UNDECODABLE, StoreError
from ts_handlers.system.files import open_locked, write_atomically
from ts_handlers.system.ownership import is_private_folder

SWEPT_AFTER_SECONDS = 600.0


class Failure(msgspec.Struct, frozen=True):
    """Why a model process ended before it served: an exception's class and message."""

    type: str
    message: str


class Status(msgspec.Struct, frozen=True):
    """What a model process says of itself; `phase` is ``serving`` when it has started."""

    pid: int
    phase: str
    estimate: float | None = None
    error: Failure | None = None


class Folder:
    """One model process's folder.

    Parameters
    ----------
    path:
        Where it is; see `folder_of`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def take_lock(self) -> int | None:
        """The descriptor of the lock, or None while a process holds it that starts, serves or ends."""
        while True:
            with contextlib.suppress(FileExistsError):
                if not self.path.parent.is_dir():  # something has emptied the temporary folder
                    _private_folder()
                self.path.mkdir(mode=0o700)
            try:
                return _take_lock(self.path)
            except FileNotFoundError:
                continue  # whoever removed the folder held it
            except BlockingIOError:
                return None

    def connect(self) -> socket.socket | None:
        """A connection to the process that serves here, or None when there is none."""
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            with _short_path(self.path) as path:
                connection.connect(path)
        except OSError:
            connection.close()
            return None
        return connection

    def listen(self) -> socket.socket:
        """Where the process takes connections; to be called with the lock held."""
        (self.path / "socket").unlink(missing_ok=True)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with _short_path(self.path) as path:
            listener.bind(path)
        listener.listen(128)
        return listener

    def stop_listening(self) -> None:
        """Remove the socket; to be called with the lock held."""
        with contextlib.suppress(OSError):
            (self.path / "socket").unlink(missing_ok=True)

    def write_status(self, status: Status) -> None:
        """Replace what is said of the process; a full disk only costs the others the news."""
        with contextlib.suppress(OSError):
            write_atomically(self.path / "status", msgspec.json.encode(status))

    def read_status(self) -> Status | None:
        """What the last process said of itself."""
        try:
            return msgspec.json.decode((self.path / "status").read_bytes(), type=Status)
        except (OSError, *UNDECODABLE):
            return None

    def status_time(self) -> float:
        """When that was, in seconds since the epoch; 0 when there is nothing."""
        try:
            return (self.path / "status").stat().st_mtime
        except OSError:
            return 0.0

    def forget_status(self) -> None:
        """Remove what an earlier process said; to be called with the lock held."""
        with contextlib.suppress(OSError):
            (self.path / "status").unlink(missing_ok=True)


def folder_of(identity: Mapping[str, Any]) -> Folder:
    """The folder of the process that is started from `identity`, JSON-compatible; equal ones share a process.

    Raises
    ------
    StoreError
        The folder above it cannot be trusted: somebody else could reach the process or take its place.
    """
    text = json.dumps(identity, sort_keys=True)
    return Folder(_private_folder() / hashlib.sha256(text.encode()).hexdigest()[:16])


def sweep() -> None:
    """Remove the folders of processes that have ended, unless they were used a short time ago."""
    with contextlib.suppress(OSError, StoreError):
        for path in _private_folder().iterdir():
            if time.time() - path.lstat().st_mtime < SWEPT_AFTER_SECONDS:
                continue
            with contextlib.suppress(OSError):
                descriptor = _take_lock(path)
                shutil.rmtree(path, ignore_errors=True)
                os.close(descriptor)


def _private_folder() -> Path:
    path = Path(tempfile.gettempdir()) / f"ts_handlers-{os.geteuid()}"
    path.mkdir(mode=0o700, exist_ok=True)
    status = path.lstat()
    if not is_private_folder(path) or status.st_mode & 0o077:
        raise StoreError(
            f"{path} must be a folder of uid {os.geteuid()} with mode 0700, found uid {status.st_uid} and mode "
            f"{stat.S_IMODE(status.st_mode):04o}: whoever can write there could take the model process's place; remove "
            "it, or set TMPDIR to another folder"
        )
    return path


def _take_lock(folder: Path) -> int:
    return open_locked(folder / "lock", os.O_RDWR | os.O_CREAT)


@contextlib.contextmanager
def _short_path(folder: Path) -> Iterator[str]:
    """The socket's path by way of a descriptor: a socket's path has 107 bytes at most, whatever TMPDIR is."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{descriptor}/socket"
    finally:
        os.close(descriptor)

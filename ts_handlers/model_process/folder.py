"""The folder in which the workers of one model find its process: socket, lock and status.

``<private folder>/<digest>/``, in the folder of `private_folder`, where the digest tells apart models, devices,
settings, and the servers whose workers share::

    socket    the model process listens here while it serves
    lock      held by `flock` from before the process starts until it has ended, however it ends. Its text is the
              holder's number and start; the holder touches it while it is alive, see `ts_handlers.model_process.watch`
    status    JSON: {"pid", "phase", "estimate", "error": {"type", "message"} | null}
    ended     JSON: {"pid", "start", "code"}: how the last process has ended, written by the worker that started it
    killed    JSON: {"pid", "start", "cause"}: the last process that a worker has ended, and why

The lock is a file that only its holder removes, so it is taken as `flock` on the file that is there afterwards.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import socket
import struct
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import msgspec

from ts_handlers.errors import UNDECODABLE, StoreError
from ts_handlers.model_process.private_folder import is_closed_to_others, private_folder
from ts_handlers.system.decoding import decode_json
from ts_handlers.system.files import open_locked, write_atomically

SWEPT_AFTER_SECONDS = 600.0
CONNECT_SECONDS = 5


_Facts = TypeVar("_Facts", bound=msgspec.Struct)


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


class Holder(NamedTuple):
    """A process that holds the lock: its number, and its `ts_handlers.system.processes.process_start`."""

    pid: int
    start: int


class Ended(msgspec.Struct, frozen=True):
    """How a process has ended: `subprocess.Popen.returncode`."""

    pid: int
    start: int
    code: int


class Killed(msgspec.Struct, frozen=True):
    """Why a worker has ended a process: it was ``stopped``, or ``silent`` though nobody had stopped it."""

    pid: int
    start: int
    cause: str


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
            with contextlib.suppress(FileExistsError):  # also the folder above: something empties temporary folders
                self.path.parent.mkdir(mode=0o700, exist_ok=True)
                if not is_closed_to_others(self.path.parent):
                    raise StoreError(f"{self.path.parent} was replaced by another user's folder; restart the server")
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
        # A process that takes no connections any more lets them wait when its queue is full.
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", CONNECT_SECONDS, 0))
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
        self._write("status", status)

    def read_status(self) -> Status | None:
        """What the last process said of itself."""
        return self._read("status", Status)

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

    def is_free(self) -> bool:
        """Whether no process holds the lock."""
        lock = self.take_lock()
        if lock is not None:
            os.close(lock)
        return lock is not None

    def sign(self) -> tuple[Holder, int] | None:
        """The lock's holder, and when it was touched last, in nanoseconds; None where no holder stands in it."""
        with contextlib.suppress(OSError, ValueError), (self.path / "lock").open("rb") as file:
            pid, start = file.read(64).split()
            return Holder(int(pid), int(start)), os.fstat(file.fileno()).st_mtime_ns
        return None

    def give_up(self, holder: Holder) -> None:
        """Let another process take the place of one that was killed and does not end, if it still is the holder."""
        with contextlib.suppress(OSError):
            descriptor = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX)  # of several workers one removes it
                sign = self.sign()
                if sign is not None and sign[0] == holder:
                    (self.path / "lock").unlink()
            finally:
                os.close(descriptor)

    def write_ended(self, holder: Holder, code: int) -> None:
        """Leave for the others how a process has ended."""
        self._write("ended", Ended(*holder, code))

    def write_killed(self, holder: Holder, cause: str) -> None:
        """Leave for the others that a worker ends a process, and why."""
        self._write("killed", Killed(*holder, cause))

    def ended(self, holder: Holder) -> int | None:
        """What `write_ended` has left of this process."""
        found = self._read("ended", Ended)
        return found.code if found is not None and (found.pid, found.start) == holder else None

    def killed(self, holder: Holder) -> str | None:
        """What `write_killed` has left of this process."""
        found = self._read("killed", Killed)
        return found.cause if found is not None and (found.pid, found.start) == holder else None

    def _write(self, name: str, facts: Any) -> None:
        with contextlib.suppress(OSError):
            write_atomically(self.path / name, msgspec.json.encode(facts))

    def _read(self, name: str, kind: type[_Facts]) -> _Facts | None:
        try:
            return decode_json((self.path / name).read_bytes(), kind)
        except (OSError, *UNDECODABLE):
            return None


def write_holder(lock: int, holder: Holder) -> None:
    """Write into an open lock who holds it; on a full disk nobody can end the holder later."""
    with contextlib.suppress(OSError):
        os.ftruncate(lock, os.pwrite(lock, b"%d %d" % holder, 0))


def folder_of(identity: Mapping[str, Any]) -> Folder:
    """The folder of the process that is started from `identity`, JSON-compatible; equal ones share a process.

    Raises
    ------
    StoreError
        The temporary folder takes no folder.
    """
    text = json.dumps(identity, sort_keys=True)
    return Folder(private_folder() / hashlib.sha256(text.encode()).hexdigest()[:16])


def sweep() -> None:
    """Remove the folders of processes that have ended, unless they were used a short time ago."""
    with contextlib.suppress(OSError, StoreError):
        for path in private_folder().iterdir():
            if time.time() - path.lstat().st_mtime < SWEPT_AFTER_SECONDS:
                continue
            with contextlib.suppress(OSError):
                descriptor = _take_lock(path)
                shutil.rmtree(path, ignore_errors=True)
                os.close(descriptor)


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

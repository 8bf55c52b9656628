"""Files that several processes share: written in one step, locked while they are in use.

A reader of a shared file must never see half of it, and a process may be killed at any moment. So a file is written
under a temporary name beside its target and then renamed; what a killed process leaves has a name that
`is_temporary` recognises.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

NAME_LIMIT = 255
"""Bytes that file systems accept in the name of a file."""


@contextlib.contextmanager
def atomic_file(path: Path, *, mode: int = 0o666, durable: bool = False, replace: bool = True) -> Iterator[BinaryIO]:
    """A binary file to write, which appears as `path` at the end of the block, whole or not at all.

    Until then it lies in the same folder as ``.<name>.<process>.<random>``, with as much of the name as fits. If the
    block or a step after it fails, the temporary file is removed and `path` is what it was before.

    Parameters
    ----------
    path:
        The target; its folder must exist.
    mode:
        Permissions of a new file, without the bits of the process's umask.
    durable:
        Flush the file to the disk before it gets its name, so that a power cut leaves the old file or the new one.
    replace:
        Whether an existing file is replaced. If not, the file gets its name by a hard link, which is atomic on NFS too.

    Raises
    ------
    FileExistsError
        There is a file and `replace` is False.
    OSError
        The folder is missing, cannot be written, or the disk is full.

    Examples
    --------
    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> with atomic_file(folder / "facts.json") as file:
    ...     _ = file.write(b"{}")
    ...     [path.name == "facts.json" for path in folder.iterdir()]
    [False]
    >>> [path.name for path in folder.iterdir()]
    ['facts.json']
    """
    # The random part: processes of two containers may have the same number.
    ending = f".{os.getpid()}.{os.urandom(8).hex()}"
    temporary = path.with_name(f".{bounded_name(path.name, NAME_LIMIT - 1 - len(ending))}{ending}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    try:
        with open(descriptor, "wb") as file:
            yield file
            file.flush()
            if durable:
                os.fsync(file.fileno())
        if replace:
            os.replace(temporary, path)
        else:
            os.link(temporary, path)
            _unlink(temporary)
    except BaseException:
        _unlink(temporary)
        raise


class RememberingWriter(io.RawIOBase):
    """A file that is written and never raises: `check` raises what went wrong.

    For native code that does not survive an error of its file: torch's writer of archives writes again when it is
    destroyed, and ends the process when that raises.

    Parameters
    ----------
    path:
        A new file.

    Raises
    ------
    OSError
        It cannot be made.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._file = open(path, "xb")  # noqa: SIM115
        self._error: OSError | None = None

    def writable(self) -> bool:
        """True."""
        return True

    def seekable(self) -> bool:
        """True."""
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """As of any file."""
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        """As of any file."""
        return self._file.tell()

    def write(self, data: Any) -> int:
        """Write all of it, or nothing once something has gone wrong; says in both cases that all is written."""
        size = memoryview(data).nbytes
        if self._error is None:
            try:
                self._file.write(data)
            except OSError as error:
                self._error = error
        return size

    def flush(self) -> None:
        """Write what is buffered."""
        if self._error is None and not self._file.closed:
            try:
                self._file.flush()
            except OSError as error:
                self._error = error

    def close(self) -> None:
        """Close the file."""
        self.flush()
        try:
            self._file.close()
        except OSError as error:
            self._error = self._error or error
        super().close()

    def check(self) -> None:
        """Raise `OSError` if not everything has been written."""
        self.flush()
        if self._error is not None:
            raise self._error


def write_atomically(path: Path, data: bytes | str, *, mode: int = 0o666, durable: bool = False) -> None:
    """Replace a file's whole content in one step; text is written as UTF-8. See `atomic_file`."""
    with atomic_file(path, mode=mode, durable=durable) as file:
        file.write(data.encode() if isinstance(data, str) else data)


def is_temporary(name: str) -> bool:
    """Whether a file's name is that of one being written, or left by a process that died while it wrote.

    Every name with a leading dot is: `atomic_file` makes such names, and nothing that is kept in a shared folder has
    one.

    Examples
    --------
    >>> is_temporary(".facts.json.17.0123456789abcdef"), is_temporary("facts.json")
    (True, False)
    """
    return name.startswith(".")


def bounded_name(name: str, limit: int = NAME_LIMIT) -> str:
    """A file name of at most `limit` bytes: `name` itself, or its beginning and a digest of all of it.

    Examples
    --------
    >>> bounded_name("model"), bounded_name("m" * 300, 24)
    ('model', 'mmmmmmm-88c6e4c1d9337601')
    """
    data = os.fsencode(name)
    if len(data) <= limit:
        return name
    digest = hashlib.sha256(data).hexdigest()[:16]
    return f"{data[: limit - 17].decode(errors='ignore')}-{digest}"


def fsync(path: Path) -> None:
    """Flush one file or folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def lock(descriptor: int, path: Path, *, shared: bool = False, wait: bool = False) -> None:
    """Lock an open file or folder, and look whether it is still the one at `path`.

    The lock is a `flock`. The kernel releases it when the descriptor is closed or its process ends, however it ends. A
    process that removes or replaces a file holds the file's lock, so the look must come after locking.

    Parameters
    ----------
    shared:
        Take a shared lock, which others may hold too, and not an exclusive one.
    wait:
        Wait for whoever holds the lock.

    Raises
    ------
    BlockingIOError
        Another process holds the lock, and `wait` is False.
    FileNotFoundError
        The file was removed or replaced between opening and locking it.
    OSError
        The file system has no locks.
    """
    fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
    if not is_at(descriptor, path):
        raise FileNotFoundError(errno.ENOENT, "it was removed or replaced", os.fspath(path))


def open_locked(path: Path, flags: int = os.O_RDONLY | os.O_NOFOLLOW, *, shared: bool = False) -> int:
    """Open a file or folder and lock it without waiting; closing the descriptor releases the lock.

    Raises
    ------
    OSError
        It cannot be opened, or as of `lock`; nothing stays open.
    """
    descriptor = os.open(path, flags | os.O_CLOEXEC, 0o600)
    try:
        lock(descriptor, path, shared=shared)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def is_at(descriptor: int, path: Path) -> bool:
    """Whether an open file or folder is still the one at `path`."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path, follow_symlinks=False))
    except OSError:
        return False


def close_if_same(descriptor: int, identity: os.stat_result | tuple[int, int]) -> bool:
    """Close a descriptor if it is still the file that it was; False when it is not, and then nothing is closed.

    Foreign code in this process may have closed it, and the number may be somebody else's file meanwhile.

    Parameters
    ----------
    identity:
        What `os.fstat` said when it was opened, or its device and inode.
    """
    try:
        device, inode = (identity.st_dev, identity.st_ino) if isinstance(identity, os.stat_result) else identity
        status = os.fstat(descriptor)
        if (status.st_dev, status.st_ino) != (device, inode):
            return False
        os.close(descriptor)
    except OSError:
        return False
    return True


def _unlink(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink()

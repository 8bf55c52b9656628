"""Objects in a folder that several hosts mount.

Others may write to the folder. No symbolic link below it is followed, neither to read nor to write, and what is no
plain file is no object: a reader that waits for a named pipe would wait for ever.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from ts_handlers.errors import RefusedError, StoreError
from ts_handlers.settings.sections import RemoteSettings
from ts_handlers.store.remote.base import UnusableError
from ts_handlers.store.remote.clients.fsspec_client import FsspecClient
from ts_handlers.system.files import atomic_file, is_temporary, write_atomically

_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_OBJECT = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


class FolderClient(FsspecClient):
    """An `ObjectClient` on a mounted folder, where a reader never sees half a file.

    An object that cannot be read, because it is a link for example, is refused like one with a wrong signature: others
    can still be read. A folder in place of which there is something else raises `StoreError` when it is written to.
    """

    def __init__(self, settings: RemoteSettings) -> None:
        super().__init__(settings)
        self.exclusive_create = "always"

    def open(self, name: str) -> BinaryIO:
        """See `ObjectClient`. Raises `RefusedError` for what is no plain file that this process may read."""
        with self._folder_of(name) as (folder, base):
            try:
                descriptor = os.open(base, _OBJECT, dir_fd=folder)
            except FileNotFoundError:
                raise
            except OSError as error:
                if error.errno in (errno.ELOOP, errno.ENXIO, errno.EACCES, errno.EPERM):
                    raise RefusedError(f"it is no plain file that can be read: {error.strerror}") from error
                raise
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                os.close(descriptor)
                raise RefusedError("it is no plain file")
            return os.fdopen(descriptor, "rb")

    def get(self, name: str) -> bytes:
        """See `ObjectClient`."""
        with self.open(name) as file:
            return file.read()

    def exists(self, name: str) -> bool:
        """See `ObjectClient`; also True for what is no plain file, since nothing can be created there."""
        try:
            with self._folder_of(name) as (folder, base):
                os.stat(base, dir_fd=folder, follow_symlinks=False)
        except (FileNotFoundError, RefusedError):
            return False
        return True

    def list(self, folder: str, *, recursive: bool) -> list[str]:
        """See `ObjectClient`; without links, special files and the files that are being written."""
        found: list[str] = []
        try:
            with self._folder_of(f"{folder}/_") as (top, _):
                for path, folders, files, descriptor in os.fwalk(".", dir_fd=top, follow_symlinks=False):
                    names = [name for name in files if not is_temporary(name) and _is_plain(name, descriptor)]
                    found += [os.path.normpath(f"{path}/{name}") for name in names]
                    if not recursive:
                        return found + folders
        except (FileNotFoundError, RefusedError):
            return []
        return found

    def create(self, name: str, source: Path | bytes) -> None:
        """See `ObjectClient`; complete from the first moment. Raises `FileExistsError`."""
        with self._target(name) as target, atomic_file(target, durable=True, replace=False) as write:
            if isinstance(source, bytes):
                write.write(source)
            else:
                with open(source, "rb") as read:
                    shutil.copyfileobj(read, write, 1 << 20)

    def put(self, name: str, data: bytes) -> None:
        """See `ObjectClient`."""
        with self._target(name) as target:
            write_atomically(target, data)

    def delete(self, name: str) -> None:
        """See `ObjectClient`; what is no file stays."""
        with self._folder_of(name) as (folder, base):
            if not stat.S_ISDIR(os.stat(base, dir_fd=folder, follow_symlinks=False).st_mode):
                os.unlink(base, dir_fd=folder)

    @contextlib.contextmanager
    def _target(self, name: str) -> Iterator[Path]:
        """The file of an object, in its folder, which is made and stays the one that was opened."""
        try:
            with self._folder_of(name, make=True) as (folder, base):
                yield Path(f"/proc/self/fd/{folder}") / base
        except RefusedError as error:
            raise StoreError(f"{name} cannot be written: {error}") from error

    @contextlib.contextmanager
    def _folder_of(self, name: str, *, make: bool = False) -> Iterator[tuple[int, str]]:
        """Descriptor of the folder of an object, and the object's name in it.

        Raises
        ------
        RefusedError
            On the way from the store's folder there is a link or a file.
        """
        above, _, base = name.rpartition("/")
        try:
            descriptor = os.open(self._base, _FOLDER)
        except (FileNotFoundError, NotADirectoryError):  # each time: a folder whose mount has gone is not made again
            raise UnusableError(f"the folder {self._base} does not exist; make or mount it") from None
        try:
            for part in filter(None, above.split("/")):
                if make:
                    with contextlib.suppress(FileExistsError):
                        os.mkdir(part, dir_fd=descriptor)
                try:
                    inner = os.open(part, _FOLDER | os.O_NOFOLLOW, dir_fd=descriptor)
                except OSError as error:
                    if error.errno in (errno.ENOTDIR, errno.ELOOP, errno.EACCES):
                        raise RefusedError(f"{part!r} on the way to it is no folder that can be entered") from error
                    raise
                os.close(descriptor)
                descriptor = inner
            yield descriptor, base
        finally:
            os.close(descriptor)


def _is_plain(name: str, folder: int) -> bool:
    try:
        return stat.S_ISREG(os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode)
    except OSError:
        return False

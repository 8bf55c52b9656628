"""Objects in a folder that several hosts mount."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from ts_handlers.settings.sections import RemoteSettings
from ts_handlers.store.remote.base import UnusableError
from ts_handlers.store.remote.clients.fsspec_client import FsspecClient
from ts_handlers.system.files import atomic_file, is_temporary, write_atomically


class FolderClient(FsspecClient):
    """An `ObjectClient` on a mounted folder: reads through fsspec; writes so that a reader never sees half a file."""

    def __init__(self, settings: RemoteSettings) -> None:
        super().__init__(settings)
        self.exclusive_create = "always"

    def _path(self, name: str) -> str:
        if not os.path.isdir(self._base):  # each time: a folder whose mount has gone must not be made again
            raise UnusableError(f"the folder {self._base} does not exist; make or mount it")
        return super()._path(name)

    def list(self, folder: str, *, recursive: bool) -> list[str]:
        """See `ObjectClient`; without the files that are being written."""
        names = super().list(folder, recursive=recursive)
        return [name for name in names if not is_temporary(name.rpartition("/")[2])]

    def create(self, name: str, source: Path | bytes) -> None:
        """See `ObjectClient`; complete from the first moment. Raises `FileExistsError`."""
        with atomic_file(self._target(name), durable=True, replace=False) as write:
            if isinstance(source, bytes):
                write.write(source)
            else:
                with open(source, "rb") as read:
                    shutil.copyfileobj(read, write, 1 << 20)

    def put(self, name: str, data: bytes) -> None:
        """See `ObjectClient`."""
        write_atomically(self._target(name), data)

    def _target(self, name: str) -> Path:
        """The file of an object, in its folder, which is made."""
        target = Path(self._path(name))
        target.parent.mkdir(parents=True, exist_ok=True)
        return target

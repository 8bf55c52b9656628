"""Objects in a folder that several hosts mount."""

from __future__ import annotations

import contextlib
import os
import shutil
import uuid
from pathlib import Path

from ts_handlers.settings.sections import RemoteSettings
from ts_handlers.store.remote.base import UnusableError
from ts_handlers.store.remote.clients.fsspec_client import FsspecClient


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
        return [
            name for name in super().list(folder, recursive=recursive) if not name.rpartition("/")[2].startswith(".")
        ]

    def create(self, name: str, source: Path | bytes) -> None:
        """See `ObjectClient`; complete from the first moment. Raises `FileExistsError`."""
        target = Path(self._path(name))
        temporary = _beside(target)
        try:
            with open(temporary, "xb") as write:
                if isinstance(source, bytes):
                    write.write(source)
                else:
                    with open(source, "rb") as read:
                        shutil.copyfileobj(read, write, 1 << 20)
                write.flush()
                os.fsync(write.fileno())
            os.link(temporary, target)  # atomic on NFS too, unlike O_EXCL followed by writing
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink()

    def put(self, name: str, data: bytes) -> None:
        """See `ObjectClient`."""
        target = Path(self._path(name))
        temporary = _beside(target)
        temporary.write_bytes(data)
        os.replace(temporary, target)


def _beside(target: Path) -> Path:
    """A name for what is being written, in the target's folder, which is made."""
    target.parent.mkdir(parents=True, exist_ok=True)
    return target.with_name(f".{target.name}.{uuid.uuid4().hex}")

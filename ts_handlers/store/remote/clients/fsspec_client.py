"""Objects through fsspec."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, BinaryIO

from fsspec.core import url_to_fs

from ts_handlers.settings.sections import RemoteSettings
from ts_handlers.store.remote.base import ExclusiveCreate
from ts_handlers.store.remote.clients.protocols import OBJECT_STORES, protocol_of

_BLOCK = 16 << 20  # bytes read ahead: most entries come in one request


class FsspecClient:
    """An `ObjectClient` on the file system that fsspec has for the URL.

    Create is conditional where the file system's ``mode="create"`` is: s3fs and adlfs send If-None-Match, gcsfs
    ifGenerationMatch=0; the base class of fsspec asks first and writes then, which two hosts can do at once.
    """

    exclusive_create: ExclusiveCreate

    def __init__(self, settings: RemoteSettings) -> None:
        system, path = url_to_fs(settings.url, use_listings_cache=False, skip_instance_cache=True, **settings.options)
        self._system: Any = system
        self._base = path.rstrip("/")
        self.exclusive_create = "try" if protocol_of(settings.url) in OBJECT_STORES else "never"

    def _path(self, name: str) -> str:
        return f"{self._base}/{name}"

    def open(self, name: str) -> BinaryIO:
        """See `ObjectClient`; asks for the size first."""
        stream: BinaryIO = self._system.open(self._path(name), "rb", block_size=_BLOCK, cache_type="readahead")
        return stream

    def get(self, name: str) -> bytes:
        """See `ObjectClient`."""
        return bytes(self._system.cat_file(self._path(name)))

    def exists(self, name: str) -> bool:
        """See `ObjectClient`."""
        return bool(self._system.exists(self._path(name)))

    def list(self, folder: str, *, recursive: bool) -> list[str]:
        """See `ObjectClient`."""
        path = self._path(folder)
        try:
            found = self._system.find(path) if recursive else self._system.ls(path, detail=False)
        except FileNotFoundError:
            return []
        return [str(item).removeprefix(f"{path}/") for item in found]

    def create(self, name: str, source: Path | bytes) -> None:
        """See `ObjectClient`."""
        if isinstance(source, bytes):
            self._system.pipe_file(self._path(name), source, mode="create")
        else:
            self._system.put_file(os.fspath(source), self._path(name), mode="create")

    def put(self, name: str, data: bytes) -> None:
        """See `ObjectClient`."""
        self._system.pipe_file(self._path(name), data)

    def delete(self, name: str) -> None:
        """See `ObjectClient`."""
        self._system.rm_file(self._path(name))

"""Objects of S3, GCS and Azure through the package obstore.

Its own file system for fsspec is not used: `obstore.fsspec.FsspecStore` ignores ``mode="create"`` and overwrites.
"""

from __future__ import annotations

import contextlib
import io
import mmap
import re
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, BinaryIO

import obstore
import obstore.store
from obstore.exceptions import BaseError

from ts_handlers.errors import StoreError
from ts_handlers.settings.sections import RemoteSettings
from ts_handlers.store.remote.base import ExclusiveCreate
from ts_handlers.store.remote.clients.obstore_options import translate

LARGEST = 5000 << 20
"""Bytes of one conditional request, on Azure; 5 GiB on S3."""
_CHUNK = 1 << 20
_RETRIES = 2
_CONNECT_SECONDS = 5.0


class ObstoreClient:
    """An `ObjectClient` on S3, GCS or Azure.

    Nobody waits longer than `timeout_seconds` of the settings for an answer. A request ends by itself soon afterwards,
    and is tried again only while somebody waits.

    Raises
    ------
    SettingsError
        The settings hold an option that obstore has no counterpart for.
    """

    exclusive_create: ExclusiveCreate = "try"

    def __init__(self, settings: RemoteSettings) -> None:
        arguments, seconds = translate(settings.url, settings.options), settings.timeout_seconds
        # A second more, so that the one who waits gives up first and says why.
        limits = {"timeout": timedelta(seconds=seconds + 1), "connect_timeout": timedelta(seconds=_CONNECT_SECONDS)}
        backoff = {"init_backoff": timedelta(seconds=0.1), "max_backoff": timedelta(seconds=1), "base": 2}
        make: Any = getattr(obstore.store, arguments.kind)
        retries = {"max_retries": _RETRIES, "retry_timeout": timedelta(seconds=seconds), "backoff": backoff}
        with _short_errors():
            self._store: Any = make(
                arguments.bucket,
                prefix=arguments.prefix or None,
                config=arguments.config,
                client_options={**limits, **arguments.client_options},
                retry_config=retries,
            )

    def open(self, name: str) -> BinaryIO:
        """See `ObjectClient`; one request."""
        with _short_errors():
            chunks = obstore.get(self._store, name).stream(min_chunk_size=_CHUNK)
        return io.BufferedReader(_Chunks(iter(chunks)), _CHUNK)

    def get(self, name: str) -> bytes:
        """See `ObjectClient`."""
        with _short_errors():
            return bytes(obstore.get(self._store, name).bytes())

    def exists(self, name: str) -> bool:
        """See `ObjectClient`."""
        with _short_errors(), contextlib.suppress(FileNotFoundError):
            obstore.head(self._store, name)
            return True
        return False

    def list(self, folder: str, *, recursive: bool) -> list[str]:
        """See `ObjectClient`."""
        with _short_errors():
            if recursive:
                found = [item["path"] for page in obstore.list(self._store, folder) for item in page]
            else:
                below = obstore.list_with_delimiter(self._store, folder)
                found = [*below["common_prefixes"], *(item["path"] for item in below["objects"])]
        return [path.removeprefix(f"{folder}/") for path in found]

    def create(self, name: str, source: Path | bytes) -> None:
        """See `ObjectClient`; one request, so a file's bytes are mapped into memory."""
        if isinstance(source, bytes):
            with _short_errors():
                obstore.put(self._store, name, source, mode="create")
            return
        size = source.stat().st_size
        if size > LARGEST:
            raise StoreError(
                f"{name} has {size} bytes and one conditional request takes {LARGEST}; set remote.client: fsspec, "
                "which sends in parts"
            )
        with open(source, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data, _short_errors():
            obstore.put(self._store, name, data, mode="create")

    def put(self, name: str, data: bytes) -> None:
        """See `ObjectClient`."""
        with _short_errors():
            obstore.put(self._store, name, data, use_multipart=False)

    def delete(self, name: str) -> None:
        """See `ObjectClient`."""
        with _short_errors():
            obstore.delete(self._store, name)


@contextlib.contextmanager
def _short_errors() -> Iterator[None]:
    """Errors without the page of Rust structures that obstore appends, but with the system's reason found in it."""
    try:
        yield
    except BaseError as error:
        text, _, structures = str(error).partition("\n\nDebug source:")
        reasons = [kind for kind in re.findall(r"kind: (\w+)", structures) if kind != "Request"]
        raise OSError(f"{text} ({reasons[-1]})" if reasons else text) from None


class _Chunks(io.RawIOBase):
    """A stream of the bytes that an iterator yields piece by piece."""

    def __init__(self, chunks: Any) -> None:
        self._chunks = chunks
        self._left = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._left:
            with _short_errors():
                chunk = next(self._chunks, None)
            if chunk is None:
                return 0
            self._left = memoryview(chunk)
        count = min(len(buffer), len(self._left))
        buffer[:count] = self._left[:count]
        self._left = self._left[count:]
        return count

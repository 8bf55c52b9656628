"""What the remote store needs of a library that reaches objects, and which library a URL gets.

================  ====================================================================================
`FolderClient`    ``file://``: a mounted folder; reads through fsspec, creates by `os.link`
`ObstoreClient`   S3, GCS, Azure through the package obstore, which is quickly imported and connected
`FsspecClient`    everything else; S3, GCS, Azure where obstore is missing or does not know what is needed
================  ====================================================================================
"""

from __future__ import annotations

import importlib.util
import logging
from pathlib import Path
from typing import BinaryIO, Protocol
from urllib.parse import urlsplit

from ts_handlers.settings.sections import RemoteSettings
from ts_handlers.store.remote.breaker import UnusableError

logger = logging.getLogger(__name__)

LOCAL = ("file", "local")
FILE_SYSTEMS = {
    **dict.fromkeys(("s3", "s3a"), "s3fs"),
    **dict.fromkeys(("gs", "gcs"), "gcsfs"),
    **dict.fromkeys(("abfs", "abfss", "az"), "adlfs"),
}
"""The object stores: their protocols, and the packages with fsspec's file systems."""


class ObjectClient(Protocol):
    """Objects below a URL; names are relative to it and consist of plain characters.

    A method that is asked for an object that does not exist raises `FileNotFoundError`; any other error speaks against
    the service. Methods may block and are called from several threads.
    """

    def open(self, name: str) -> BinaryIO:
        """The object's bytes, to be read once from start to end."""

    def read(self, name: str) -> bytes:
        """All bytes of an object, in one request, so that an overwriting writer does no harm."""

    def exists(self, name: str) -> bool:
        """Whether there is such an object."""

    def list(self, folder: str, recursive: bool) -> list[str]:
        """Names of objects (and, unless recursive, folders) below a folder, relative to it; none raises nothing."""

    def create(self, name: str, source: Path | bytes) -> None:
        """Make an object in one operation that fails, with whatever error, when it exists."""

    def overwrite(self, name: str, data: bytes) -> None:
        """Write an object; readers see the old bytes or the new ones."""

    def remove(self, name: str) -> None:
        """Remove an object."""


def protocol_of(url: str) -> str:
    """The protocol of a URL or an absolute path."""
    return urlsplit(url).scheme or "file"


def open_client(settings: RemoteSettings) -> ObjectClient:
    """The client for the settings' URL; imports its library.

    Raises
    ------
    UnusableError
        A package is missing, or the URL cannot be reached as it is configured.
    """
    try:
        return _open(settings, protocol_of(settings.url))
    except ImportError as error:
        extra = {"s3fs": "s3", "gcsfs": "gcs", "adlfs": "azure"}.get(
            FILE_SYSTEMS.get(protocol_of(settings.url), ""), "remote"
        )
        raise UnusableError(f"a package cannot be imported ({error}); pip install 'ts-handlers[{extra}]'") from error


def _open(settings: RemoteSettings, protocol: str) -> ObjectClient:
    if protocol in LOCAL:
        from ts_handlers.store.remote.clients.folder import FolderClient

        return FolderClient(settings)
    if settings.client != "fsspec" and protocol in FILE_SYSTEMS:
        client = _open_obstore(settings, FILE_SYSTEMS[protocol])
        if client is not None:
            return client
    from ts_handlers.store.remote.clients.fsspec_client import FsspecClient

    return FsspecClient(settings)


def _open_obstore(settings: RemoteSettings, file_system: str) -> ObjectClient | None:
    """The client of obstore; None when fsspec shall be taken."""
    from ts_handlers.errors import SettingsError
    from ts_handlers.store.remote.clients.obstore_options import reason_for_fsspec, translate

    if settings.client == "auto":
        if importlib.util.find_spec("obstore") is None:
            return None
        try:
            reason = reason_for_fsspec(translate(settings.url, settings.options))
        except SettingsError as error:
            logger.debug("through fsspec: %s", error)
            return None
        if reason is not None and importlib.util.find_spec(file_system) is not None:
            logger.debug("through fsspec: %s", reason)
            return None
    from ts_handlers.store.remote.clients.obstore_client import ObstoreClient

    return ObstoreClient(translate(settings.url, settings.options), settings.timeout_seconds)

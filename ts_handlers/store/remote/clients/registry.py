"""Which client library reaches the objects of a URL.

To add a client, write one file with a class of the contract `ts_handlers.store.remote.base.ObjectClient` beside this
one, and add one line to `CLIENTS`.
"""

from __future__ import annotations

import dataclasses
import importlib
import logging
from collections.abc import Container
from typing import Any

from ts_handlers.settings.sections import RemoteSettings
from ts_handlers.store.remote.base import ObjectClient, UnusableError
from ts_handlers.store.remote.clients.protocols import FOLDER, OBJECT_STORES, extra_of, protocol_of

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Client:
    """One client library. Its module is imported when it is taken, and not before.

    Attributes
    ----------
    name: as the setting ``remote.client`` has it.
    where: ``<module>:<class>``, the module in this folder.
    protocols: of the URLs that it serves; None serves every URL.
    options: a module in this folder with two functions, or None:
        ``check(settings)`` raises `SettingsError` for what this client cannot do;
        ``reason_against(settings)`` says why ``client: auto`` takes the next client, or returns None.
    """

    name: str
    where: str
    protocols: Container[str] | None = None
    options: str | None = None

    def serves(self, settings: RemoteSettings) -> bool:
        """Whether the settings' URL and their choice of a client allow this one."""
        protocol = protocol_of(settings.url)
        if self.protocols is not None and protocol not in self.protocols:
            return False
        return protocol in FOLDER or settings.client in ("auto", self.name)


CLIENTS = (
    Client("folder", "folder:FolderClient", FOLDER),
    Client("obstore", "obstore_client:ObstoreClient", OBJECT_STORES, options="obstore_options"),
    Client("fsspec", "fsspec_client:FsspecClient"),
)
"""The first one that serves the URL is taken. fsspec's file systems serve what no other client does."""


def open_client(settings: RemoteSettings) -> ObjectClient:
    """The client for the settings' URL; imports its library.

    Raises
    ------
    UnusableError
        A package is missing, or the URL cannot be reached as it is configured.
    """
    chosen = next((client for client in CLIENTS if _takes(client, settings)), CLIENTS[-1])
    module, _, name = chosen.where.partition(":")
    try:
        client: ObjectClient = getattr(_import(module), name)(settings)
    except ImportError as error:
        extra = extra_of(protocol_of(settings.url))
        raise UnusableError(f"a package cannot be imported ({error}); pip install 'ts-handlers[{extra}]'") from error
    return client


def check_settings(settings: RemoteSettings) -> None:
    """Check URL and options for the client that the settings name; ``auto`` takes one that understands them.

    Raises
    ------
    SettingsError
        Naming what the client cannot do.
    """
    for client in CLIENTS:
        if client.name == settings.client and client.options is not None:
            _import(client.options).check(settings)


def _takes(client: Client, settings: RemoteSettings) -> bool:
    if not client.serves(settings):
        return False
    if client.options is None or settings.client != "auto":
        return True
    reason = _import(client.options).reason_against(settings)
    if reason is not None:
        logger.debug("not through %s: %s", client.name, reason)
    return reason is None


def _import(module: str) -> Any:
    return importlib.import_module(f"{__package__}.{module}")

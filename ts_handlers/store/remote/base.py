"""The contracts of a remote store: objects with names below a URL, which hosts share.

=================  ===================================================================================================
`ObjectClient`     one library (fsspec, obstore, a mounted folder): it may block and may raise anything
`Remote`           what the rest of the package uses: bounded in time, one kind of error for all failures
=================  ===================================================================================================

`ts_handlers.store.remote.objects.RemoteObjects` makes a `Remote` of an `ObjectClient`;
`ts_handlers.store.remote.read_only.ReadOnlyRemote` makes one that is never written to of any other. Clients are in
`ts_handlers.store.remote.clients`, and `ts_handlers.store.remote.clients.registry` chooses one for a URL.

Names of objects are relative to the URL and consist of plain characters and slashes.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, Literal, Protocol, TypeVar

from ts_handlers.settings.sections import RemoteSettings
from ts_handlers.store.remote.budget import TimeBudget

T = TypeVar("T")
ExclusiveCreate = Literal["always", "try", "never"]


class UnusableError(Exception):
    """A service cannot be used as it is configured: a package or a folder is missing. The message says what to do."""


class ObjectClient(Protocol):
    """Objects below a URL through one library. A class of this contract is made with `RemoteSettings` alone.

    A method that is asked for an object that does not exist raises `FileNotFoundError`. Any other error speaks against
    the service. `UnusableError` and `StoreError` have messages for the user; of other errors the type is shown too.
    Methods may block, for ever in the worst case, and are called from several threads.

    Attributes
    ----------
    exclusive_create: whether `create` fails when another host has just made the object. ``always``; ``never``; ``try``
        where that depends on the server, so that it is tried once with an object of its own.
    """

    exclusive_create: ExclusiveCreate

    def open(self, name: str) -> BinaryIO:
        """The bytes of an object as a stream, which is read once from start to end."""

    def get(self, name: str) -> bytes:
        """All bytes of an object, in one request: a writer that replaces the object meanwhile does no harm."""

    def put(self, name: str, data: bytes) -> None:
        """Write an object, also over an existing one; readers see the old bytes or the new ones, never a part."""

    def create(self, name: str, source: Path | bytes) -> None:
        """Make an object of bytes, or of those of a file, in one operation; it fails when the object exists.

        The error for an existing object is the library's own. Readers see all bytes or no object.
        """

    def delete(self, name: str) -> None:
        """Remove an object."""

    def exists(self, name: str) -> bool:
        """Whether there is such an object."""

    def list(self, folder: str, *, recursive: bool) -> list[str]:
        """Names of the objects below a folder, relative to it; an empty list when there is no such folder.

        Unless `recursive`, only those directly in the folder; names of folders may be among them.
        """


class Remote(Protocol):
    """The objects of a remote store, as a start may use them.

    Every method raises `RemoteError` when the remote does not answer in time or fails, and at once for a while after
    that. A call may take as long as the whole `budget`; calls within ``budget.counting()`` share it. Before the first
    call nothing is imported or connected.
    """

    @property
    def name(self) -> str:
        """The URL without secrets, for messages."""

    @property
    def settings(self) -> RemoteSettings:
        """The section ``remote`` of the settings."""

    @property
    def budget(self) -> TimeBudget:
        """What the remote may still cost a start."""

    @property
    def problem(self) -> str | None:
        """Why the remote is not asked for now; None when it is."""

    @property
    def accepts_writes(self) -> bool:
        """Whether this host may write to the remote at all. If not, methods that write raise `StoreError`."""

    def require_exclusive_create(self) -> None:
        """Make sure that two hosts cannot both create an object. Raises `StoreError` when they could."""

    def read(self, name: str, consume: Callable[[BinaryIO], T]) -> T | None:
        """What `consume` makes of the bytes of an object; None when there is no such object.

        `consume` runs in another thread. Its stream raises `TimeoutError` once nobody waits for it any more. Its
        `RefusedError` and `StoreError` reach the caller and are no failures of the remote.
        """

    def get(self, name: str) -> bytes | None:
        """All bytes of an object that its writer may replace; None when there is no such object."""

    def put(self, name: str, data: bytes) -> None:
        """Write an object that has one writer; readers see the old bytes or the new ones."""

    def create(self, name: str, source: Path | bytes) -> bool:
        """Make an object of bytes, or of those of a file; False when it exists, and then nothing is changed."""

    def delete(self, name: str) -> None:
        """Remove an object, if it is there."""

    def exists(self, name: str) -> bool:
        """Whether there is such an object."""

    def list(self, folder: str, *, recursive: bool = False) -> list[str]:
        """Names of the objects below a folder, relative to it, in order; see `ObjectClient.list`."""

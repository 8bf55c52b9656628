"""A remote store that this host reads and never writes to: the setting ``remote.read_only``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, NoReturn, TypeVar

from ts_handlers.errors import StoreError
from ts_handlers.settings.sections import RemoteSettings
from ts_handlers.store.remote.base import Remote
from ts_handlers.store.remote.budget import TimeBudget

T = TypeVar("T")


class ReadOnlyRemote:
    """A `Remote` that passes reads on to another one. What would write raises `StoreError` and asks nobody."""

    accepts_writes = False

    def __init__(self, inner: Remote) -> None:
        self._inner = inner

    @property
    def name(self) -> str:
        """See `Remote`."""
        return self._inner.name

    @property
    def settings(self) -> RemoteSettings:
        """See `Remote`."""
        return self._inner.settings

    @property
    def budget(self) -> TimeBudget:
        """See `Remote`."""
        return self._inner.budget

    @property
    def problem(self) -> str | None:
        """See `Remote`."""
        return self._inner.problem

    def read(self, name: str, consume: Callable[[BinaryIO], T]) -> T | None:
        """See `Remote`."""
        return self._inner.read(name, consume)

    def get(self, name: str) -> bytes | None:
        """See `Remote`."""
        return self._inner.get(name)

    def exists(self, name: str) -> bool:
        """See `Remote`."""
        return self._inner.exists(name)

    def list(self, folder: str, *, recursive: bool = False) -> list[str]:
        """See `Remote`."""
        return self._inner.list(folder, recursive=recursive)

    def require_exclusive_create(self) -> None:
        """Raise `StoreError`."""
        self._refuse()

    def create(self, name: str, source: Path | bytes) -> bool:
        """Raise `StoreError`."""
        self._refuse()

    def put(self, name: str, data: bytes) -> None:
        """Raise `StoreError`."""
        self._refuse()

    def delete(self, name: str) -> None:
        """Raise `StoreError`."""
        self._refuse()

    def _refuse(self) -> NoReturn:
        raise StoreError(f"{self.name} is not written to: remote.read_only is set")

"""The objects of a remote store, and what a slow, dead or lying server may cost: a mounted folder, S3, GCS, Azure.

Objects below the URL (their format is in `ts_handlers.store.remote.sealed`, their names are in `names.py`)::

    entries/<model>/<model digest>/<device>/<key>.<version>    sealed entries
    canaries/<key>/<weights digest>.<version>                  sealed canary records
    leases/<key>/...                                              see ts_handlers.store.remote.object_lease

Sealed objects are written once, by a create that fails when the object exists, and never replaced or removed by this
package. Only file systems whose create is atomic are written to; others are read.

How the objects are reached is `ts_handlers.store.remote.clients`.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, TypeVar
from urllib.parse import urlsplit, urlunsplit

from ts_handlers.errors import RefusedError, StoreError, one_line
from ts_handlers.settings.sections import RemoteSettings
from ts_handlers.store.remote.base import ObjectClient
from ts_handlers.store.remote.breaker import Breaker
from ts_handlers.store.remote.budget import TimeBudget
from ts_handlers.store.remote.clients.protocols import OBJECT_STORES, protocol_of
from ts_handlers.store.remote.clients.registry import check_settings, open_client

_PROBE = "exclusive-create"
_PROBE_TEXT = b"This object shows that a second create of it fails.\n"
_SECRET = re.compile(r"key|secret|token|pass|cred|sas|conn|auth", re.IGNORECASE)
T = TypeVar("T")


class RemoteObjects:
    """A `Remote` on the client library that suits the URL, with a circuit breaker around every call.

    Parameters
    ----------
    settings:
        URL, options, client and timeout.
    state:
        Folder for the circuit breaker's state; None keeps it in this object.
    budget:
        What the remote may still cost a start; a new one of `timeout_seconds` by default.

    Raises
    ------
    SettingsError
        The client that the settings name cannot do what they ask for.
    """

    accepts_writes = True

    def __init__(self, settings: RemoteSettings, state: Path | None, budget: TimeBudget | None = None) -> None:
        check_settings(settings)
        self.settings = settings
        self.name = redact_url(settings.url)
        self.budget = budget or TimeBudget(settings.timeout_seconds)
        identity = hashlib.sha256(settings.url.encode()).hexdigest()[:16]
        file = None if state is None else state / f"{identity}.json"
        self._breaker = Breaker(file, self.name, self.budget, self._redact)
        self._client: ObjectClient | None = None
        self._is_exclusive: bool | None = None
        self._lock = threading.Lock()

    @property
    def problem(self) -> str | None:
        """See `Remote`; reads the circuit breaker's state."""
        return self._breaker.reason if self._breaker.is_open else None

    def _redact(self, text: str) -> str:
        return redact(text, self.settings.url, self.settings.options)

    def _open(self) -> ObjectClient:
        with self._lock:
            if self._client is None:
                self._client = open_client(self.settings)
            return self._client

    def read(self, name: str, consume: Callable[[BinaryIO], T]) -> T | None:
        """See `Remote`."""

        def run(given_up: threading.Event) -> T | None:
            try:
                stream = self._open().open(name)
            except FileNotFoundError:
                return None
            with stream:
                watched = _Watched(stream, given_up)
                try:
                    return consume(watched)  # type: ignore[arg-type]
                except (RefusedError, StoreError):
                    raise
                except Exception as error:
                    if watched.has_failed:
                        raise
                    raise RefusedError(f"it is damaged: {type(error).__name__}: {one_line(error)}") from error

        return self._breaker.call(f"reading {name}", run)

    def get(self, name: str) -> bytes | None:
        """See `Remote`; one request."""

        def run(_: threading.Event) -> bytes | None:
            try:
                return self._open().get(name)
            except (FileNotFoundError, RefusedError):
                return None

        return self._breaker.call(f"reading {name}", run)

    def exists(self, name: str) -> bool:
        """See `Remote`."""
        return self._breaker.call(f"looking for {name}", lambda _: self._open().exists(name))

    def list(self, folder: str, *, recursive: bool = False) -> list[str]:
        """See `Remote`."""
        return self._breaker.call(f"listing {folder}", lambda _: sorted(self._open().list(folder, recursive=recursive)))

    def create(self, name: str, source: Path | bytes) -> bool:
        """See `Remote`."""
        return self._breaker.call(f"writing {name}", lambda _: self._create(name, source))

    def _create(self, name: str, source: Path | bytes) -> bool:
        client = self._open()
        try:
            client.create(name, source)
        except StoreError:
            raise
        except Exception:
            if client.exists(name):  # each library has an error of its own for this; and an answer may have been lost
                return False
            raise
        return True

    def put(self, name: str, data: bytes) -> None:
        """See `Remote`."""
        self._breaker.call(f"writing {name}", lambda _: self._open().put(name, data))

    def delete(self, name: str) -> None:
        """See `Remote`."""

        def run(_: threading.Event) -> None:
            with contextlib.suppress(FileNotFoundError):
                self._open().delete(name)

        self._breaker.call(f"removing {name}", run)

    def require_exclusive_create(self) -> None:
        """See `Remote`; tries it with an object of its own where it depends on the server.

        Raises
        ------
        StoreError
            Two hosts could create the same object, so this file system must not be written to.
        """
        if self._is_exclusive is None:
            self._is_exclusive = self._breaker.call("trying exclusive create", lambda _: self._try_exclusive_create())
        if not self._is_exclusive:
            raise StoreError(
                f"{self.name}: the server overwrites an object in spite of If-None-Match, so two hosts could replace "
                "each other's entries; entries are read from it and not written. Use a server that supports "
                "conditional writes"
            )

    def _try_exclusive_create(self) -> bool:
        known = self._open().exclusive_create
        if known == "never":
            raise StoreError(
                f"{self.name}: {protocol_of(self.settings.url)} has no atomic create, so entries are read from it and "
                f"not written; use a mounted folder or one of {', '.join(OBJECT_STORES)} where entries are built"
            )
        if known == "always":
            return True
        # The first may be the one that makes it; the second must fail.
        return not (self._create(_PROBE, _PROBE_TEXT) and self._create(_PROBE, _PROBE_TEXT))


class _Watched:
    """A binary stream whose reads fail once nobody waits for them any more."""

    def __init__(self, stream: BinaryIO, given_up: threading.Event) -> None:
        self._stream = stream
        self._given_up = given_up
        self.has_failed = False

    def read(self, count: int) -> bytes:
        self.has_failed = True  # while it is under way
        if self._given_up.is_set():
            raise TimeoutError("nobody waits for this any more")
        data = self._stream.read(count)
        self.has_failed = False
        return data


def redact_url(url: str) -> str:
    """A URL without user, password and query.

    Examples
    --------
    >>> redact_url("redis://me:secret@host:6379/0?password=x")
    'redis://host:6379/0'
    """
    parts = urlsplit(url)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def redact(text: str, url: str, options: Mapping[str, Any]) -> str:
    """A message without the secrets of a URL and of storage options."""
    parts = urlsplit(url)
    secrets = {parts.username, parts.password, parts.query, *_secrets(options)}
    for secret in sorted((item for item in secrets if item and len(item) > 3), key=len, reverse=True):
        text = text.replace(secret, "***")
    text = re.sub(r"(https?://[^\s?\"']*)\?[^\s\"',)]*", r"\1?***", text)  # Azure's SAS tokens are part of the query
    return re.sub(r"//[^/\s@]*@", "//***@", text)


def _secrets(options: Mapping[str, Any]) -> list[str]:
    """Strings below names that speak of credentials; an endpoint or a region stays readable."""
    found = []
    for name, value in options.items():
        if _SECRET.search(str(name)):
            found += _strings(value)
        elif isinstance(value, Mapping):
            found += _secrets(value)
    return found


def _strings(value: Any) -> list[str]:
    if isinstance(value, Mapping):
        return [text for item in value.values() for text in _strings(item)]
    if isinstance(value, (list, tuple)):
        return [text for item in value for text in _strings(item)]
    return [value] if isinstance(value, str) else []

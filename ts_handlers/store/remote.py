"""Objects in a folder that hosts share, through fsspec: a mounted folder, S3 and its kin, GCS, Azure.

Objects below the URL (see `ts_handlers.store.sealed` for their format)::

    entries/<model>/<model digest>/<device>/<key>.<generation>    sealed entries
    canaries/<key>/<weights digest>.<generation>                  sealed canary records
    leases/<key>/...                                              see ts_handlers.store.object_lease

Sealed objects are written once, by a create that fails when the object exists, and never replaced or removed by this
package. Only file systems whose create is atomic are written to; others are read.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import threading
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, TypeVar
from urllib.parse import urlsplit, urlunsplit

from ts_handlers.errors import StoreError
from ts_handlers.settings.sections import RemoteSettings
from ts_handlers.store.breaker import Breaker, UnusableError

# Protocols whose `put_file(mode="create")` is one conditional request (s3fs: If-None-Match, gcsfs: ifGenerationMatch=0,
# adlfs: If-None-Match); the base class of fsspec asks first and writes then, which two hosts can do at once.
_CONDITIONAL = ("s3", "s3a", "gs", "gcs", "abfs", "abfss", "az")
_LOCAL = ("file", "local")
_BLOCK = 16 << 20  # bytes read ahead: most entries come in one request
_PROBE = "exclusive-create"
_PROBE_TEXT = b"This object shows that a second create of it fails.\n"
_SECRET = re.compile(r"key|secret|token|pass|cred|sas|conn|auth", re.IGNORECASE)
T = TypeVar("T")


class Remote:
    """The objects below a URL. Nothing is imported or connected before the first call.

    Parameters
    ----------
    settings:
        URL, options and timeout.
    state:
        Folder for the circuit breaker's state; None keeps it in this object.

    Every method raises `RemoteError` when the remote does not answer in time or not as it should, and at once while
    the breaker is open.
    """

    def __init__(self, settings: RemoteSettings, state: Path | None) -> None:
        self.settings = settings
        self.name = redact_url(settings.url)
        identity = hashlib.sha256(settings.url.encode()).hexdigest()[:16]
        file = None if state is None else state / f"{identity}.json"
        self.breaker = Breaker(file, self.name, settings.timeout_seconds, self._clean)
        self._protocol = urlsplit(settings.url).scheme or "file"
        self._opened: tuple[Any, str] | None = None
        self._exclusive: bool | None = None
        self._lock = threading.Lock()

    def _clean(self, text: str) -> str:
        return redact(text, self.settings.url, self.settings.options)

    def _open(self) -> tuple[Any, str]:
        """The file system and the path of the URL in it."""
        with self._lock:
            if self._opened is None:
                try:
                    from fsspec.core import url_to_fs

                    system, path = url_to_fs(
                        self.settings.url,
                        use_listings_cache=False,
                        skip_instance_cache=True,
                        **self.settings.options,
                    )
                except ImportError as error:
                    raise UnusableError(
                        f"a package cannot be imported ({error}); pip install 'ts-handlers[remote]' and the file "
                        "system's package (s3fs, gcsfs, adlfs)"
                    ) from error
                self._opened = system, path.rstrip("/")
            system, path = self._opened
            if self._protocol in _LOCAL and not os.path.isdir(path):
                raise UnusableError(f"the folder {path} does not exist; make or mount it")
            return system, path

    def read(self, name: str, consume: Callable[[BinaryIO], T], *, charged: bool = True) -> T | None:
        """What `consume` makes of an object's bytes, or None when there is no such object.

        `consume` runs in another thread and gets a stream that ends with an error once nobody waits any more.
        """

        def run(given_up: threading.Event) -> T | None:
            system, base = self._open()
            try:
                stream = system.open(f"{base}/{name}", "rb", block_size=_BLOCK, cache_type="readahead")
            except FileNotFoundError:
                return None
            with stream:
                return consume(_Watched(stream, given_up))  # type: ignore[arg-type]

        return self.breaker.call(f"reading {name}", run, charged=charged)

    def read_small(self, name: str, *, charged: bool = True) -> bytes | None:
        """All bytes of an object that its writer overwrites, in one request; None when there is no such object.

        `read` asks for the size first, and fails when the object is overwritten in between.
        """

        def run(_: threading.Event) -> bytes | None:
            system, base = self._open()
            try:
                return bytes(system.cat_file(f"{base}/{name}"))
            except FileNotFoundError:
                return None

        return self.breaker.call(f"reading {name}", run, charged=charged)

    def exists(self, name: str, *, charged: bool = True) -> bool:
        """Whether there is such an object."""

        def run(_: threading.Event) -> bool:
            system, base = self._open()
            return bool(system.exists(f"{base}/{name}"))

        return self.breaker.call(f"looking for {name}", run, charged=charged)

    def list(self, folder: str, *, charged: bool = True, recursive: bool = False) -> list[str]:
        """Names of the objects below a folder, relative to it."""

        def run(_: threading.Event) -> list[str]:
            system, base = self._open()
            try:
                found = system.find(f"{base}/{folder}") if recursive else system.ls(f"{base}/{folder}", detail=False)
            except FileNotFoundError:
                return []
            names = (str(path).removeprefix(f"{base}/{folder}/") for path in found)
            return sorted(name for name in names if not name.rpartition("/")[2].startswith("."))  # being written

        return self.breaker.call(f"listing {folder}", run, charged=charged)

    def create(self, name: str, source: Path | bytes, *, charged: bool = False) -> bool:
        """Make an object of bytes, or of a file's, unless it exists; False when it does."""

        def run(_: threading.Event) -> bool:
            system, base = self._open()
            return self._create(system, f"{base}/{name}", source)

        return self.breaker.call(f"writing {name}", run, charged=charged)

    def _create(self, system: Any, path: str, source: Path | bytes) -> bool:
        if self._protocol in _LOCAL:
            return _link_new(Path(path), source)
        try:
            if isinstance(source, bytes):
                system.pipe_file(path, source, mode="create")
            else:
                system.put_file(os.fspath(source), path, mode="create")
        except Exception:
            if system.exists(path):  # each file system has an error of its own for this
                return False
            raise
        return True

    def overwrite(self, name: str, data: bytes, *, charged: bool = False) -> None:
        """Write an object of which there is one writer; readers see the old bytes or the new ones."""

        def run(_: threading.Event) -> None:
            system, base = self._open()
            if self._protocol in _LOCAL:
                _replace(Path(base, name), data)
            else:
                system.pipe_file(f"{base}/{name}", data)

        self.breaker.call(f"writing {name}", run, charged=charged)

    def remove(self, name: str) -> None:
        """Remove an object, if it is there."""

        def run(_: threading.Event) -> None:
            system, base = self._open()
            with contextlib.suppress(FileNotFoundError):
                system.rm_file(f"{base}/{name}")

        self.breaker.call(f"removing {name}", run, charged=False)

    def require_exclusive_create(self, *, charged: bool = False) -> None:
        """Make sure that two hosts cannot both create an object, where that is not known beforehand.

        Raises
        ------
        StoreError
            They could, so this file system must not be written to.
        """
        if self._protocol in _LOCAL:
            return
        if self._protocol not in _CONDITIONAL:
            raise StoreError(
                f"{self.name}: {self._protocol} has no atomic create, so entries are read from it and not written; "
                f"use a mounted folder or one of {', '.join(_CONDITIONAL)} where entries are built"
            )
        if self._exclusive is None:

            def run(_: threading.Event) -> bool:
                system, base = self._open()
                path = f"{base}/{_PROBE}"
                # The first may be the one that makes it; the second must fail.
                return not (self._create(system, path, _PROBE_TEXT) and self._create(system, path, _PROBE_TEXT))

            self._exclusive = self.breaker.call("trying exclusive create", run, charged=charged)
        if not self._exclusive:
            raise StoreError(
                f"{self.name}: the server overwrites an object in spite of If-None-Match, so two hosts could replace "
                "each other's entries; entries are read from it and not written. Use a server that supports "
                "conditional writes"
            )


class _Watched:
    """A binary stream whose reads fail once nobody waits for them any more."""

    def __init__(self, stream: BinaryIO, given_up: threading.Event) -> None:
        self._stream = stream
        self._given_up = given_up

    def read(self, count: int) -> bytes:
        if self._given_up.is_set():
            raise TimeoutError("nobody waits for this any more")
        return self._stream.read(count)


def _link_new(target: Path, source: Path | bytes) -> bool:
    """Make `target` with the bytes of `source`, complete from the first moment; False when it exists."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
    try:
        with open(temporary, "xb") as write:
            if isinstance(source, bytes):
                write.write(source)
            else:
                with open(source, "rb") as read:
                    shutil.copyfileobj(read, write, 1 << 20)
            write.flush()
            os.fsync(write.fileno())
        try:
            os.link(temporary, target)  # atomic on NFS too, unlike O_EXCL followed by writing
        except FileExistsError:
            return False
        return True
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def _replace(target: Path, data: bytes) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
    temporary.write_bytes(data)
    os.replace(temporary, target)


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

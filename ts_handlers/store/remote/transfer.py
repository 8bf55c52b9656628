"""Entries, canary records and records of names on their way between hosts: sealed and sent, fetched and checked.

The format of a sealed file is in `ts_handlers.store.remote.sealed`, the names of the objects are in
`ts_handlers.store.remote.names`.
"""

from __future__ import annotations

import dataclasses
import io
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, Generic, TypeVar

import torch

from ts_handlers.errors import RefusedError, StoreError
from ts_handlers.key.names import Names, names_digest
from ts_handlers.store.address import Address, entry_path
from ts_handlers.store.canaries import load_record
from ts_handlers.store.entry import MANIFEST, Manifest, read_manifest, verify_files
from ts_handlers.store.outside import LIMIT as NAMES_LIMIT
from ts_handlers.store.outside import encode_names, read_names
from ts_handlers.store.remote.base import Remote
from ts_handlers.store.remote.names import VERSIONS, canary_subject, outside_name, version_names
from ts_handlers.store.remote.sealed import SealedReader, seal
from ts_handlers.store.remote.signing import Keyring

CANARY = "canary.pt"
NAMES = "names.json"
CANARY_LIMIT = 1 << 30  # bytes
T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Fetched(Generic[T]):
    """What a fetch found.

    Attributes
    ----------
    value: what was made of the accepted object; None when there is none.
    refused: why earlier versions were refused, each with its name.
    """

    value: T | None
    refused: tuple[str, ...]


def fetch(remote: Remote, name: str, consume: Callable[[BinaryIO], T]) -> Fetched[T]:
    """Read the first version of an object that is accepted.

    Parameters
    ----------
    name:
        Of the object, without the version number.
    consume:
        Reads an object, and raises `RefusedError` for one that is not accepted.

    Raises
    ------
    RemoteError
        The remote failed.
    StoreError
        Raised by `consume`: there is no room here for what is read.
    """
    refused: list[str] = []
    for version in version_names(name):
        try:
            value = remote.read(version, consume)
        except RefusedError as error:
            refused.append(f"{version}: {error}")
            continue
        return Fetched(value, tuple(refused))
    return Fetched(None, tuple(refused))


def send(remote: Remote, name: str, source: Path, check: Callable[[BinaryIO], object]) -> bool:
    """Write a sealed file as the first version that does not exist.

    Parameters
    ----------
    name:
        Of the object, without the version number.
    check:
        Raises `RefusedError` for an existing object that this host would not use.

    Returns
    -------
    False when there is an object that `check` accepts: the first writer wins, and nothing was written.

    Raises
    ------
    RemoteError
        The remote failed.
    StoreError
        Every version exists and is refused.
    """
    for version in version_names(name):
        if remote.create(version, source):
            return True
        try:
            remote.read(version, check)
        except RefusedError:
            continue
        return False
    raise StoreError(f"{name}: all {VERSIONS} objects of this key in {remote.name} are refused; remove them")


def seal_entry(target: BinaryIO, directory: Path, subject: str, keyring: Keyring) -> None:
    """Write the entry in a directory as one sealed file.

    Parameters
    ----------
    subject:
        The address of the entry, as `ts_handlers.store.address.entry_path` gives it.

    Raises
    ------
    StoreError
        The entry is damaged.
    """
    try:
        manifest = read_manifest(directory)
        verify_files(directory, manifest)
    except ValueError as error:
        raise StoreError(f"the entry {subject} is damaged and was not sent: {error}") from error
    sources: dict[str, Path | bytes] = {name: directory / name for name in [MANIFEST, *manifest.files]}
    seal(target, "entry", subject, sources, keyring)


def unseal_entry(stream: BinaryIO, directory: Path, subject: str | None, keyring: Keyring) -> tuple[Address, Manifest]:
    """Check a sealed entry and write its files into an empty private directory.

    Parameters
    ----------
    subject:
        The address that it must have; None accepts any.

    Raises
    ------
    RefusedError
        It must not be used; what the directory holds is to be removed.
    StoreError
        The directory has no room for it.
    """
    reader = SealedReader(stream, keyring, "entry", subject)
    reader.extract(directory)
    try:
        manifest = read_manifest(directory)
    except (FileNotFoundError, ValueError) as error:
        raise RefusedError(str(error)) from error
    except OSError as error:
        raise StoreError(f"what was unpacked cannot be read: {error}") from error
    if {MANIFEST: reader.header.files.get(MANIFEST), **manifest.files} != reader.header.files:
        raise RefusedError("its manifest lists other files than its header")
    parts = reader.header.subject.split("/")
    if len(parts) != 4 or parts[3] != manifest.cache_key.digest:
        raise RefusedError(f"its manifest's key is {manifest.cache_key.digest}, its address {reader.header.subject!r}")
    address = Address(parts[0], parts[1], parts[2], manifest.cache_key)
    if entry_path(address) != reader.header.subject:
        raise RefusedError(f"{reader.header.subject!r} is no address of an entry")
    return address, manifest


def verify_entry(stream: BinaryIO, subject: str | None, keyring: Keyring) -> None:
    """Check signature and digests of a sealed entry without writing anything.

    Raises
    ------
    RefusedError
        It must not be used.
    """
    SealedReader(stream, keyring, "entry", subject).verify()


def seal_canary(target: BinaryIO, record: dict[str, Any], key: str, weights_digest: str, keyring: Keyring) -> None:
    """Write a canary record as one sealed file."""
    buffer = io.BytesIO()
    torch.save(record, buffer)
    seal(target, "canary", canary_subject(key, weights_digest), {CANARY: buffer.getvalue()}, keyring)


def unseal_canary(stream: BinaryIO, subject: str | None, keyring: Keyring) -> tuple[str, str, dict[str, Any]]:
    """Check a sealed canary record.

    Returns
    -------
    The digest of the key, the weights digest and the record.

    Raises
    ------
    RefusedError
        It must not be used.
    """
    reader = SealedReader(stream, keyring, "canary", subject)
    key, _, weights_digest = reader.header.subject.partition("/")
    data = reader.read(CANARY, CANARY_LIMIT)
    try:
        return key, weights_digest, load_record(data)
    except ValueError as error:
        raise RefusedError(str(error)) from error


def seal_names(target: BinaryIO, names: Names, base: str, keyring: Keyring) -> None:
    """Write a record of what a model reads from outside its archive as one sealed file."""
    seal(target, "outside", f"{base}/{names_digest(names)}", {NAMES: encode_names(names)}, keyring)


def unseal_names(stream: BinaryIO, subject: str, keyring: Keyring) -> Names:
    """Check a sealed record of names; `subject` is ``<base key>/<names digest>``.

    Raises
    ------
    RefusedError
        It must not be used.
    """
    data = SealedReader(stream, keyring, "outside", subject).read(NAMES, NAMES_LIMIT)
    try:
        return read_names(subject.rpartition("/")[2], data)
    except ValueError as error:
        raise RefusedError(str(error)) from error


def send_names(remote: Remote, names: Names, base: str, keyring: Keyring) -> bool:
    """Write a record of names, unless there is one already; errors as of `send`."""
    with tempfile.TemporaryDirectory(prefix="ts_handlers-sealed-") as folder:
        sealed, digest = Path(folder) / "sealed", names_digest(names)
        with open(sealed, "wb") as file:
            seal_names(file, names, base, keyring)
        subject = f"{base}/{digest}"
        return send(remote, outside_name(base, digest), sealed, lambda stream: unseal_names(stream, subject, keyring))

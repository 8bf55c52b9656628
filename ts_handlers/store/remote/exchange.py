"""Entries and canary records as sealed objects of a remote store: how they are named, written, and read back.

An object is written once and never replaced. Its name ends with a generation, counted from 0: the first object of a key
whose signature and digests this host accepts is the key's; a refused one is stepped over. So nobody's object can be
taken for another's, a reader never sees two, and what a removed key signed is followed by what its successor signs.
"""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, Generic, TypeVar

import torch

from ts_handlers.errors import RefusedError, StoreError
from ts_handlers.store.address import Address, entry_path
from ts_handlers.store.canaries import load_record
from ts_handlers.store.entry import MANIFEST, Manifest, read_manifest, verify_files
from ts_handlers.store.remote.base import Remote
from ts_handlers.store.remote.sealed import SealedReader, seal
from ts_handlers.store.remote.signing import Trust

GENERATIONS = 4
CANARY = "canary.pt"
CANARY_LIMIT = 1 << 30  # bytes
T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Fetched(Generic[T]):
    """What a fetch found: the accepted object, if any, and why others were refused."""

    value: T | None
    refused: tuple[str, ...]


def entry_name(address: Address) -> str:
    """The name of an entry's objects, without the generation."""
    return f"entries/{entry_path(address)}"


def canary_name(key: str, weights_digest: str) -> str:
    """The name of a canary record's objects, without the generation."""
    return f"canaries/{key}/{weights_digest}"


def fetch(remote: Remote, name: str, consume: Callable[[BinaryIO], T]) -> Fetched[T]:
    """Read the first generation of an object that `consume` accepts; it raises `RefusedError` for the others."""
    refused: list[str] = []
    for generation in range(GENERATIONS):
        try:
            value = remote.read(f"{name}.{generation}", consume)
        except RefusedError as error:
            refused.append(f"{name}.{generation}: {error}")
            continue
        return Fetched(value, tuple(refused))
    return Fetched(None, tuple(refused))


def send(remote: Remote, name: str, source: Path, check: Callable[[BinaryIO], object]) -> bool:
    """Write a sealed file as the first generation that is free.

    Parameters
    ----------
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
        Every generation is taken by an object that is refused.
    """
    for generation in range(GENERATIONS):
        if remote.create(f"{name}.{generation}", source):
            return True
        try:
            remote.read(f"{name}.{generation}", check)
        except RefusedError:
            continue
        return False
    raise StoreError(f"{name}: all {GENERATIONS} objects of this key in {remote.name} are refused; remove them")


def seal_entry(target: BinaryIO, directory: Path, subject: str, trust: Trust) -> None:
    """Seal the entry in a directory.

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
    seal(target, "entry", subject, sources, trust)


def unseal_entry(stream: BinaryIO, directory: Path, subject: str | None, trust: Trust) -> tuple[Address, Manifest]:
    """Check a sealed entry and write its files into an empty private directory.

    Raises
    ------
    RefusedError
        It must not be used; what the directory holds is to be removed.
    """
    reader = SealedReader(stream, trust, "entry", subject)
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


def verify_entry(stream: BinaryIO, subject: str | None, trust: Trust) -> None:
    """Check signature and digests of a sealed entry without writing anything. Raises `RefusedError`."""
    SealedReader(stream, trust, "entry", subject).verify()


def seal_canary(target: BinaryIO, record: dict[str, Any], key: str, weights_digest: str, trust: Trust) -> None:
    """Seal a canary record."""
    buffer = io.BytesIO()
    torch.save(record, buffer)
    seal(target, "canary", f"{key}/{weights_digest}", {CANARY: buffer.getvalue()}, trust)


def unseal_canary(stream: BinaryIO, subject: str | None, trust: Trust) -> tuple[str, str, dict[str, Any]]:
    """Check a sealed canary record; returns the key, the weights digest and the record. Raises `RefusedError`."""
    reader = SealedReader(stream, trust, "canary", subject)
    key, _, weights_digest = reader.header.subject.partition("/")
    data = reader.read(CANARY, CANARY_LIMIT)
    try:
        return key, weights_digest, load_record(data)
    except ValueError as error:
        raise RefusedError(str(error)) from error

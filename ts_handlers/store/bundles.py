"""Moving entries, with their canary records, between a local store, a remote one and bundles.

A bundle is one sealed file (see `ts_handlers.store.remote.sealed`) of kind ``bundle`` and subject ``bundle``, whose
files are sealed files themselves: ``entry-<number>`` and ``canary-<number>``, the same bytes that a remote store holds.
"""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, Literal

from ts_handlers.errors import RefusedError, StoreError
from ts_handlers.key.cache_key import CacheKey
from ts_handlers.store.address import Address, entry_path
from ts_handlers.store.entry import MANIFEST, Manifest, read_manifest
from ts_handlers.store.local.layout import CANARIES, ENTRIES, ENTRY_DEPTH
from ts_handlers.store.local.store import LocalStore
from ts_handlers.store.remote import transfer
from ts_handlers.store.remote.base import Remote
from ts_handlers.store.remote.names import canary_name, entry_name
from ts_handlers.store.remote.sealed import SealedReader, check_name, seal
from ts_handlers.store.remote.signing import Keyring
from ts_handlers.store.upkeep.scan import EntryInfo
from ts_handlers.system.files import atomic_file

_BUNDLE = "bundle"


@dataclasses.dataclass(frozen=True)
class Moved:
    """What became of one entry.

    Attributes
    ----------
    subject: the entry's address, ``<model>/<model digest>/<device>/<key>``.
    outcome: ``done``; ``present`` (it was there already and stays); ``refused`` (by signature or digest); ``failed``.
    reason: why it was refused or failed.
    canaries: how many canary records went with it.
    """

    subject: str
    outcome: Literal["done", "present", "refused", "failed"]
    reason: str = ""
    canaries: int = 0


def push(store: LocalStore, entries: Iterable[EntryInfo], remote: Remote, trust: Keyring) -> Iterator[Moved]:
    """Send entries and their canary records to a remote store, one after the other; existing objects stay.

    Raises
    ------
    RemoteError
        The remote failed; what has been yielded is there.
    StoreError
        The remote's file system has no exclusive create, or this host may not publish.
    """
    if not trust.may_publish:
        raise StoreError("public keys are given and no signing key: nobody with these keys would accept what is sent")
    remote.require_exclusive_create()
    for entry in entries:
        with _scratch(store) as folder:
            sealed = folder / "sealed"
            try:
                address = _seal_entry(sealed, entry.directory, trust)
            except (StoreError, ValueError) as error:
                yield Moved(_subject(entry), "failed", str(error))
                continue
            subject, base = entry_path(address), address.key.base.digest
            if names := store.read_outside(base):
                transfer.send_names(remote, names, base, trust)
            new = transfer.send(remote, entry_name(address), sealed, _entry_check(subject, trust))
            canaries = 0
            for weights in store.canaries(address):
                _seal_canary(sealed, store, address, weights, trust)
                subject_of_canary = f"{address.key.digest}/{weights}"
                canaries += transfer.send(
                    remote,
                    canary_name(address.key.digest, weights),
                    sealed,
                    _canary_check(subject_of_canary, trust),
                )
            yield Moved(subject, "done" if new else "present", canaries=canaries)


def pull(
    store: LocalStore, remote: Remote, trust: Keyring, wanted: Callable[[str], bool] = lambda subject: True
) -> Iterator[Moved]:
    """Fetch entries and their canary records from a remote store.

    Parameters
    ----------
    wanted:
        Which addresses, ``<model>/<model digest>/<device>/<key>``.

    Raises
    ------
    RemoteError
        The remote failed; what has been yielded is here.
    StoreError
        The local store cannot be written.
    """
    names = remote.list(ENTRIES, recursive=True)
    for subject in sorted({name.rpartition(".")[0] for name in names}):
        with contextlib.suppress(RefusedError):
            check_name(subject)
            if subject.count("/") == ENTRY_DEPTH - 1 and wanted(subject):
                yield _pull_one(store, remote, trust, subject)


def _pull_one(store: LocalStore, remote: Remote, trust: Keyring, subject: str) -> Moved:
    directory, outcome = store.root / ENTRIES / subject, "present"
    if not (directory / MANIFEST).exists():
        outcome = "done"
        with _scratch(store) as folder:

            def consume(stream: BinaryIO) -> tuple[Address, Manifest]:
                staging = _fresh(folder / "entry")
                return transfer.unseal_entry(stream, staging, subject, trust)

            fetched = transfer.fetch(remote, f"{ENTRIES}/{subject}", consume)
            if fetched.value is None:
                return Moved(subject, "refused", "; ".join(fetched.refused))
            address, manifest = fetched.value
            directory = store.publish(address, folder / "entry", manifest)
    address = _address(directory)
    key, canaries = address.key.digest, 0
    names = remote.list(f"{CANARIES}/{key}")
    for weights in sorted({name.rpartition(".")[0] for name in names} - set(store.canaries(address))):
        record = transfer.fetch(remote, canary_name(key, weights), _canary_check(f"{key}/{weights}", trust)).value
        canaries += record is not None and store.write_canary(address, weights, record[2])
    return Moved(subject, "done" if outcome == "done" else "present", canaries=canaries)


def export_bundle(store: LocalStore, entries: Iterable[EntryInfo], path: Path, trust: Keyring) -> list[Moved]:
    """Write entries and their canary records into one file, which appears when it is complete.

    Raises
    ------
    FileExistsError
        The file exists.
    StoreError
        An entry is damaged; nothing was written.
    """
    if path.exists():
        raise FileExistsError(f"{path} exists; name another file, or remove it")
    moved: list[Moved] = []
    files: dict[str, Path | bytes] = {}
    with _scratch(store) as folder:
        for entry in entries:
            file = folder / f"entry-{len(moved):05d}"
            try:
                address = _seal_entry(file, entry.directory, trust)
            except ValueError as error:
                raise StoreError(f"{_subject(entry)}: {error}") from error
            files[file.name] = file
            weights_digests = store.canaries(address)
            for weights in weights_digests:
                file = folder / f"canary-{len(files):05d}"
                _seal_canary(file, store, address, weights, trust)
                files[file.name] = file
            moved.append(Moved(entry_path(address), "done", canaries=len(weights_digests)))
        with atomic_file(path) as target:
            seal(target, _BUNDLE, _BUNDLE, files, trust)
    return moved


def import_bundle(store: LocalStore, path: Path, trust: Keyring) -> list[Moved]:
    """Publish the entries of a bundle, with their canary records, in a local store; existing ones stay.

    Raises
    ------
    RefusedError
        The bundle is unsigned, foreign or damaged; nothing was published.
    StoreError
        The store cannot be written.
    """
    moved: dict[str, Moved] = {}  # by address: models with the same content share a key
    with _scratch(store) as folder, open(path, "rb") as stream:
        reader = SealedReader(stream, trust, _BUNDLE, _BUNDLE)
        inside = _fresh(folder / "bundle")
        reader.extract(inside)
        entries: dict[str, tuple[Address, Path, Manifest]] = {}
        subjects: dict[str, str] = {}  # of the first entry of a key, which all of its canary records go with
        canaries: list[tuple[str, str, dict[str, Any]]] = []
        for name in sorted(reader.header.files, key=lambda name: (not name.startswith("entry-"), name)):
            with open(inside / name, "rb") as sealed:
                if name.startswith("entry-"):
                    staging = _fresh(folder / f"unsealed-{len(entries)}")
                    address, manifest = transfer.unseal_entry(sealed, staging, None, trust)
                    if entry_path(address) in entries:
                        raise RefusedError(f"{path} holds the entry {entry_path(address)} twice")
                    entries[entry_path(address)] = address, staging, manifest
                    subjects.setdefault(address.key.digest, entry_path(address))
                elif name.startswith("canary-"):
                    canaries.append(transfer.unseal_canary(sealed, None, trust))
                    if canaries[-1][0] not in subjects:
                        raise RefusedError(f"{path} holds a canary record of {canaries[-1][0]}, but not its entry")
            (inside / name).unlink()  # room for the next one
        for subject, (address, staging, manifest) in entries.items():
            present = store.has(address)
            if not present:
                store.publish(address, staging, manifest)
            moved[subject] = Moved(subject, "present" if present else "done")
        for key, weights, record in canaries:
            subject = subjects[key]
            if store.read_canary(entries[subject][0], weights) is None:
                store.write_canary(entries[subject][0], weights, record)
                moved[subject] = dataclasses.replace(moved[subject], canaries=moved[subject].canaries + 1)
    return list(moved.values())


@contextlib.contextmanager
def _scratch(store: LocalStore) -> Iterator[Path]:
    """A private folder on the store's disk."""
    with store.staging(Address("", "", "", CacheKey(()))) as folder:
        yield folder


def _fresh(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(mode=0o700)
    return folder


def _subject(entry: EntryInfo) -> str:
    return "/".join(entry.directory.parts[-ENTRY_DEPTH:])


def _address(directory: Path) -> Address:
    """The address of a published entry."""
    model, digest, device = directory.parts[-ENTRY_DEPTH:-1]
    return Address(model, digest, device, read_manifest(directory).cache_key)


def _seal_entry(target: Path, directory: Path, trust: Keyring) -> Address:
    address = _address(directory)
    with open(target, "wb") as file:
        transfer.seal_entry(file, directory, entry_path(address), trust)
    return address


def _seal_canary(target: Path, store: LocalStore, address: Address, weights: str, trust: Keyring) -> None:
    record = store.read_canary(address, weights)
    assert record is not None  # `LocalStore.canaries` has just read it
    with open(target, "wb") as file:
        transfer.seal_canary(file, record, address.key.digest, weights, trust)


def _entry_check(subject: str, trust: Keyring) -> Callable[[BinaryIO], None]:
    return lambda stream: transfer.verify_entry(stream, subject, trust)


def _canary_check(subject: str, trust: Keyring) -> Callable[[BinaryIO], tuple[str, str, dict[str, object]]]:
    return lambda stream: transfer.unseal_canary(stream, subject, trust)

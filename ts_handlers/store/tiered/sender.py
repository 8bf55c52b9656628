"""The write-back to the remote store: what this host has published is sent by a thread, and nothing is lost silently.

The first writer wins: when another host's valid object is there, nothing is sent, and this host keeps its own entry,
which has passed its own canary under the same key. A holder whose lease was taken over sends nothing.

While an entry is not sent, ``<root>/remote/unsent-<key>.entry-<address>`` exists, while a canary record is not,
``<root>/remote/unsent-<key>.<weights digest>``. So what was built or recorded while the remote was away, or was not
done when the process was killed, is sent by the next start on this host that finds the entry.
"""

from __future__ import annotations

import contextlib
import logging
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from ts_handlers.errors import RemoteError, StoreError, one_line
from ts_handlers.key.names import Names
from ts_handlers.metrics import Metrics
from ts_handlers.store.address import Address, address_digest, entry_path, safe_weights
from ts_handlers.store.entry import read_manifest
from ts_handlers.store.local.layout import CANARIES, REMOTE, UNSENT
from ts_handlers.store.local.store import LocalStore
from ts_handlers.store.outside import names_of_manifest
from ts_handlers.store.remote import transfer
from ts_handlers.store.remote.base import Remote
from ts_handlers.store.remote.lease import HeldLease
from ts_handlers.store.remote.names import canary_name, canary_subject, entry_name, outside_name
from ts_handlers.store.remote.signing import Keyring
from ts_handlers.store.tiered.write_back import WriteBack

logger = logging.getLogger(__name__)

_ENTRY = "entry-"


class Sender:
    """Sends entries and canary records to the remote store: the writing side of a `TieredStore`.

    Attributes
    ----------
    notes: lines for `describe` about the remote.
    held: the leases that this process holds, by key.
    write_back: the thread's queue of jobs.
    """

    def __init__(self, local: LocalStore, remote: Remote, keyring: Callable[[], Keyring], metrics: Metrics) -> None:
        self.notes: list[str] = []
        self.held: dict[str, HeldLease] = {}
        self._read_keyring = keyring
        self.write_back = WriteBack(remote.settings.timeout_seconds, self._failed)
        self._local = local
        self._remote = remote
        self._metrics = metrics
        self._resumed: set[str] = set()

    def keyring(self) -> Keyring:
        """The keys of this host, read at the first call; without public keys a warning and a note say what that means.

        Raises
        ------
        SettingsError
            A key file cannot be used.
        """
        keyring = self._read_keyring()
        if not keyring.required:
            text = (
                f"{self._remote.name}: trust.public_keys is not set, so whoever can write there can run code here; "
                "ts-handlers keygen makes keys"
            )
            if text not in self.notes:
                logger.warning("%s", text)
            self.note(text)
        return keyring

    def note(self, text: str) -> None:
        """Add a note, once."""
        text = one_line(text)
        if text not in self.notes:
            self.notes.append(text)

    def is_without_remote(self) -> bool:
        """Whether the remote has failed and is not asked for now; if so, a note says why."""
        problem = self._remote.problem
        if problem is None:
            return False
        self.note(f"going on alone: {self._remote.name}: {problem}")
        return True

    def _publishes(self) -> bool:
        """Whether this host ever sends anything: the remote accepts writes, and others would accept what is sent."""
        if not self._remote.accepts_writes:
            return False
        if not self.keyring().may_publish:
            self.note("nothing is sent to the remote: trust.public_keys is set and trust.signing_key is not")
            return False
        return True

    def may_write(self) -> bool:
        """Whether something can be sent now."""
        return self._publishes() and not self.is_without_remote()

    def send(self, address: Address, directory: Path) -> None:
        """Send a published entry."""
        if not self._publishes():
            return
        self._mark(self._marker(address))
        if not self.is_without_remote():
            self.write_back.submit(entry_name(address), lambda: self._send_entry(address, directory))

    def send_staged(self, address: Address, staging: Path) -> None:
        """Send an entry that could not be published here; its files are about to go."""
        if not self.may_write():
            return
        name = entry_name(address)
        try:
            sealed = self._seal_entry(address, staging)
        except (OSError, ValueError) as error:
            self._failed(name, error)
        else:
            names = names_of_manifest(read_manifest(staging).recorded)
            self.write_back.submit(name, lambda: self._send_sealed_entry(address, sealed, names))

    def resume(self, address: Address, directory: Path) -> None:
        """Send an entry of this host, or canary records of it, if an earlier start could not."""
        key, name = address.key.digest, entry_name(address)
        if name in self._resumed:
            return
        unsent = self._unsent(address)
        if not unsent:
            return
        self._resumed.add(name)
        whole = "" in unsent

        def send() -> None:
            if not self.may_write():
                return
            for weights_digest in sorted(self._local.canaries(address) if whole else unsent):
                record = self._local.read_canary(address, weights_digest)
                if record is not None:
                    self._send_canary(address, weights_digest, record)
                else:
                    self._marker(address, weights_digest).unlink(missing_ok=True)
            if whole:
                self._send_entry(address, directory)

        self.write_back.submit(name if whole else f"{CANARIES}/{key}", send)

    def send_canary(self, address: Address, weights_digest: str, record: dict[str, Any]) -> None:
        """Send a canary record."""
        if not self._publishes():
            return
        self._mark(self._marker(address, weights_digest))
        if not self.is_without_remote():
            name = canary_name(address.key.digest, weights_digest)
            self.write_back.submit(name, lambda: self._send_canary(address, weights_digest, record))

    def send_names(self, base: str, names: Names) -> None:
        """Send what a model was seen to read after its entry had been published."""
        if self.may_write():
            job: Callable[[], object] = lambda: transfer.send_names(self._remote, names, base, self.keyring())  # noqa: E731
            self.write_back.submit(outside_name(base), job)

    def _marker(self, address: Address, weights_digest: str = "") -> Path:
        """The file that says that an entry, or one of its canary records, is not sent."""
        what = safe_weights(weights_digest) if weights_digest else f"{_ENTRY}{address_digest(address)}"
        return self._local.root / REMOTE / f"{UNSENT}{address.key.digest}.{what}"

    def _mark(self, marker: Path) -> None:
        with contextlib.suppress(OSError):
            marker.parent.mkdir(mode=0o700, exist_ok=True)
            marker.touch(mode=0o600)

    def _unsent(self, address: Address) -> set[str]:
        """What is not sent: weights digests of canary records; an empty text means the entry."""
        try:
            names = os.listdir(self._local.root / REMOTE)
        except OSError:
            return set()
        key = address.key.digest
        found = {name.partition(".")[2] for name in names if name.partition(".")[0] == f"{UNSENT}{key}"}
        if f"{_ENTRY}{address_digest(address)}" in found:
            found.add("")
        return {what for what in found if not what.startswith(_ENTRY)}

    @contextlib.contextmanager
    def _marked(self, marker: Path) -> Iterator[None]:
        """Send what a marker names; the marker is removed unless the remote has failed and may answer the next time."""
        try:
            yield
        except StoreError as error:
            if not isinstance(error, RemoteError):
                marker.unlink(missing_ok=True)
            raise
        marker.unlink(missing_ok=True)

    def _send_entry(self, address: Address, directory: Path) -> None:
        with self._marked(self._marker(address)):
            names = self._local.read_outside(address.key.base.digest)
            self._send_sealed_entry(address, self._seal_entry(address, directory), names)
            (self._local.root / REMOTE / f"{UNSENT}{address.key.digest}").unlink(missing_ok=True)  # of older versions

    def _send_sealed_entry(self, address: Address, sealed: Path, names: Names) -> None:
        if names:  # before the entry, which others do not find without them
            transfer.send_names(self._remote, names, address.key.base.digest, self.keyring())
        subject, keyring = entry_path(address), self.keyring()
        check: Callable[[BinaryIO], object] = lambda stream: transfer.verify_entry(stream, subject, keyring)  # noqa: E731
        self._send(entry_name(address), sealed, address.key.digest, check)

    def _seal_entry(self, address: Address, directory: Path) -> Path:
        return self._sealed(lambda file: transfer.seal_entry(file, directory, entry_path(address), self.keyring()))

    def _send_canary(self, address: Address, weights_digest: str, record: dict[str, Any]) -> None:
        key, keyring = address.key.digest, self.keyring()
        subject = canary_subject(key, weights_digest)
        check: Callable[[BinaryIO], object] = lambda stream: transfer.unseal_canary(stream, subject, keyring)  # noqa: E731
        with self._marked(self._marker(address, weights_digest)):
            sealed = self._sealed(lambda file: transfer.seal_canary(file, record, key, weights_digest, keyring))
            self._send(canary_name(key, weights_digest), sealed, key, check)

    def _sealed(self, write: Callable[[BinaryIO], None]) -> Path:
        """A file that `_send` removes; in the temporary folder, as the store may be read-only."""
        with tempfile.NamedTemporaryFile(prefix="ts_handlers-sealed-", delete=False) as file:
            try:
                write(file)  # type: ignore[arg-type]
            except BaseException:
                os.unlink(file.name)
                raise
        return Path(file.name)

    def _send(self, name: str, sealed: Path, key: str, check: Callable[[BinaryIO], object]) -> None:
        try:
            held = self.held.get(key)
            if held is not None and not held.confirm():
                self.note(f"{name} is not sent: another host has taken the lease over")
                logger.warning("%s is not sent: another host has taken the lease over", name)
                return
            self._remote.require_exclusive_create()
            if transfer.send(self._remote, name, sealed, check):
                self._metrics.count("write_back")
            else:
                logger.info("%s is in %s already; it stays as it is", name, self._remote.name)
        finally:
            with contextlib.suppress(OSError):
                os.unlink(sealed)

    def _failed(self, name: str, error: BaseException) -> None:
        self._metrics.count("write_back_failed")
        logger.warning("%s was not sent to %s: %s", name, self._remote.name, error)
        self.note(f"{name} was not sent: {error}")

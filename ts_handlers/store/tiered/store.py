"""A local store in front of a remote one: read-through, write-back after publishing, one builder among hosts.

Lookup asks the remote only when the local store has no entry, and one process of a host at a time: the others wait for
its answer and then look here. What is fetched is verified (signature, key, digests) and published in the local store
like a build, so every later start is a local hit that imports nothing for the remote.

Publishing here comes first; a thread sends the canary record and the entry, and gives the lease back last, so that the
next holder finds both (see `ts_handlers.store.tiered.sender`).

Whatever the remote does, a start goes on: it is a miss, or a build without a lease, and a note says so.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from ts_handlers.errors import RemoteError, StoreError
from ts_handlers.key.cache_key import OUTSIDE
from ts_handlers.key.names import NO_NAMES, Names, names_digest
from ts_handlers.metrics import Metrics
from ts_handlers.store.address import Address, address_digest, entry_path
from ts_handlers.store.base import Corrupt, Hit, Miss
from ts_handlers.store.entry import Manifest
from ts_handlers.store.local.layout import FETCH_LOCK, LEASES
from ts_handlers.store.local.lease import Lease
from ts_handlers.store.local.store import LocalStore
from ts_handlers.store.remote import transfer
from ts_handlers.store.remote.base import Remote
from ts_handlers.store.remote.lease import HeldLease, LeaseService, wait_for_lease
from ts_handlers.store.remote.names import canary_name, canary_subject, entry_name, outside_name
from ts_handlers.store.remote.signing import Keyring
from ts_handlers.store.tiered.sender import Sender
from ts_handlers.system.locked_directory import empty_folder

if TYPE_CHECKING:
    from ts_handlers.model.declaration import Declaration
    from ts_handlers.model.observed_calls import ObservedCalls
    from ts_handlers.store.observed import CallsRecord

RECORDS = 64
"""How many records of names are read for one key."""

logger = logging.getLogger(__name__)


class TieredStore:
    """A `ts_handlers.store.base.Store` of two tiers: a local store, and a remote one behind it.

    Parameters
    ----------
    local, remote:
        The two tiers.
    keyring:
        Reads the key files; called when something is first fetched or sent.
    leases:
        The service through which hosts agree on one builder, or None.
    metrics:
        Gets counts of hits, misses, refusals and failures of the remote.
    """

    def __init__(
        self,
        local: LocalStore,
        remote: Remote,
        keyring: Callable[[], Keyring],
        leases: LeaseService | None,
        metrics: Metrics,
    ) -> None:
        self.name = local.name
        self.state_directory = local.state_directory
        self.shared_directory = local.shared_directory
        self._sender = Sender(local, remote, functools.cache(keyring), metrics)
        self.notes = self._sender.notes
        self.write_back = self._sender.write_back
        self._local = local
        self._remote = remote
        self._leases = leases
        self._metrics = metrics
        self._refused_versions: dict[str, int] = {}
        self._discarded: set[str] = set()
        self._names: dict[str, Names] = {}
        self._kept: list[tempfile.TemporaryDirectory[str]] = []

    def lookup(self, address: Address) -> Hit | Miss | Corrupt:
        """Find an entry here, or fetch it; an entry of the remote that must not be used is a miss.

        Raises
        ------
        SettingsError
            A key file of the settings cannot be used.
        """
        found = self._local.lookup(address)
        if isinstance(found, Hit):
            self._sender.resume(address, found.directory)
            return found
        if entry_path(address) in self._discarded or self._sender.is_without_remote():
            return found
        with self._metrics.phase("fetch"), self._one_fetcher(address) as asked_by_another:
            if asked_by_another:
                again = self._local.lookup(address)
                return again if isinstance(again, Hit) else found
            if self._learn_names(address.key.base.digest):
                return Miss((OUTSIDE,))  # under another key there may be an entry
            hit = self._fetch(address)
        if hit is not None and isinstance(found, Corrupt):
            self._metrics.count("corrupt")
            self._sender.note(f"damaged entry, fetched again: {found.reason}")
        return hit or found

    @contextlib.contextmanager
    def _one_fetcher(self, address: Address) -> Iterator[bool]:
        """Be the only process of the host that asks for this key; True when another one asked in the meantime."""
        budget = self._remote.budget
        with budget.counting():
            from filelock import FileLock, Timeout

            folder, waited = self.state_directory / LEASES, False
            lock = FileLock(folder / f"{address.key.digest}.{address_digest(address)}{FETCH_LOCK}")
            try:
                folder.mkdir(mode=0o700, exist_ok=True)
                try:
                    lock.acquire(timeout=0)
                except Timeout:
                    waited = True
                    lock.acquire(timeout=budget.left, poll_interval=0.02)
                answer = waited
            except Timeout:
                answer = True
            except (OSError, NotImplementedError):  # a read-only store: each process asks for itself
                answer = False
        try:
            yield answer
        finally:
            if lock.is_locked:
                lock.release()

    def _learn_names(self, base: str) -> bool:
        """Fetch what other hosts have seen a model read; whether that was news."""
        known = self.read_outside(base)
        try:
            with self._remote.budget.counting():
                found = self._remote.list(outside_name(base))
        except RemoteError as error:
            self._failed(error)
            return False
        keyring = self._sender.keyring()
        for digest in sorted({name.rpartition(".")[0] for name in found} - {names_digest(known)})[:RECORDS]:
            subject = f"{base}/{digest}"
            read: Callable[[BinaryIO], Names] = functools.partial(
                transfer.unseal_names, subject=subject, keyring=keyring
            )
            names: Names | None = self._ask(outside_name(base, digest), read)
            if names is not None:
                self._names[base] = self._names.get(base, NO_NAMES) | names
        learnt = self.read_outside(base)
        self._local.write_outside(base, learnt)
        return learnt != known

    def read_outside(self, base: str) -> Names:
        """See `Store`; other hosts' are known once their entry was looked for."""
        return self._local.read_outside(base) | self._names.get(base, NO_NAMES)

    def write_outside(self, base: str, names: Names) -> bool:
        """Keep names here, and send them afterwards if they are news."""
        news = not names <= self.read_outside(base)
        written = self._local.write_outside(base, names)
        if news:
            self._sender.send_names(base, names)
        return written

    def _fetch(self, address: Address) -> Hit | None:
        with contextlib.ExitStack() as stack:
            with self._remote.budget.counting():
                keyring = self._sender.keyring()  # here: mistakes in its settings are no failure of the remote
                staging = stack.enter_context(self._local.staging(address))

                def consume(stream: BinaryIO) -> Manifest:
                    empty_folder(staging)  # of what an earlier version left
                    return transfer.unseal_entry(stream, staging, entry_path(address), keyring)[1]

                manifest = self._ask(entry_name(address), consume, "remote_miss")
            if manifest is None:
                return None
            if manifest.cache_key != address.key:
                self._refused((f"{entry_name(address)}: its key is another one with the same digest",))
                return None
            self._metrics.count("remote_hit")
            logger.info("fetched %s from %s", address.key.digest, self._remote.name)
            try:
                return Hit(self._local.publish(address, staging, manifest), manifest)
            except StoreError as error:
                logger.warning("%s; serving what was fetched unpublished", error)
                self._metrics.count("publish_failed")
                kept = tempfile.TemporaryDirectory(prefix="ts_handlers-fetched-")
                self._kept.append(kept)
                shutil.copytree(staging, kept.name, dirs_exist_ok=True)
                return Hit(Path(kept.name), manifest)

    def _ask(self, name: str, consume: Callable[[BinaryIO], Any], absent: str | None = None) -> Any:
        """What `consume` makes of the first acceptable object; None when there is none or the remote fails.

        `absent` is counted where there is none.
        """
        try:
            with self._remote.budget.counting():
                fetched = transfer.fetch(self._remote, name, consume)
        except RemoteError as error:
            self._failed(error)
            return None
        except StoreError as error:  # no room for it here
            logger.warning("%s could not be fetched: %s", name, error)
            self._sender.note(str(error))
            return None
        self._refused(fetched.refused)
        self._refused_versions[name] = len(fetched.refused)
        if fetched.value is None and absent is not None:
            self._metrics.count(absent)
        return fetched.value

    def _refused(self, reasons: tuple[str, ...]) -> None:
        for reason in reasons:
            self._metrics.count("remote_refused")
            logger.warning("refused from %s: %s", self._remote.name, reason)
            self._sender.note(f"refused from the remote: {reason}")

    def _failed(self, error: RemoteError) -> None:
        if error.first:
            self._metrics.count("remote_failed")
        self._sender.note(f"going on alone: {error}")

    def build_estimate(self, address: Address) -> float | None:
        """See `Store`; the local store knows it."""
        return self._local.build_estimate(address)

    def staging(self, address: Address) -> contextlib.AbstractContextManager[Path]:
        """See `Store`; a directory of the local store."""
        return self._local.staging(address)

    def discard(self, address: Address, reason: str) -> bool:
        """Move an entry of the local store aside, and do not fetch it again; the remote's objects stay as they are."""
        self._discarded.add(entry_path(address))
        return self._local.discard(address, reason)

    def publish(self, address: Address, staging: Path, manifest: Manifest) -> Path:
        """Publish in the local store, and send the entry to the remote afterwards.

        Raises
        ------
        StoreError
            The local store cannot be written; the entry is sent nevertheless.
        """
        try:
            directory = self._local.publish(address, staging, manifest)
        except StoreError:
            self._sender.send_staged(address, staging)
            raise
        self._sender.send(address, directory)
        return directory

    @contextlib.contextmanager
    def lease(self, address: Address, estimate: float | None) -> Iterator[Lease]:
        """The right to build this key, first among the processes of this host and then among hosts; blocks."""
        with self._local.lease(address, estimate) as lease:
            held = None if self._local.has(address) else self._acquire(address, lease)
            if held is None:
                yield lease
                return
            key = address.key.digest
            self._sender.held[key] = held
            try:
                yield lease
            finally:
                # Behind the entry and the canary, which the next holder looks for.
                self._sender.write_back.submit(f"lease {key}", lambda: self._sender.held.pop(key).release())

    def _acquire(self, address: Address, lease: Lease) -> HeldLease | None:
        if self._leases is None or not self._sender.may_write():
            return None
        key, name = address.key.digest, entry_name(address)
        awaited = f"{name}.{self._refused_versions.get(name, 0)}"

        def report(text: str) -> None:
            lease.report(phase=text)
            logger.info("%s: %s", key, text)

        try:
            with self._remote.budget.counting():
                self._remote.require_exclusive_create()
            held = wait_for_lease(
                self._leases,
                key,
                self._remote.settings.heartbeat_seconds,
                lambda: self._remote.exists(awaited),
                report,
            )
        except RemoteError as error:
            self._failed(error)
            return None
        except StoreError as error:
            self._sender.note(str(error))
            return None
        if held is not None and held.grant.took_over:
            self._metrics.count("takeover")
        return held

    def read_canary(self, address: Address, weights_digest: str) -> dict[str, Any] | None:
        """The canary record of the local store, or the remote's, which is then recorded here too; None without one."""
        record = self._local.read_canary(address, weights_digest)
        if record is not None or self._sender.is_without_remote():
            return record
        name = canary_name(address.key.digest, weights_digest)
        subject, keyring = canary_subject(address.key.digest, weights_digest), self._sender.keyring()
        with self._metrics.phase("fetch"):
            found: tuple[str, str, dict[str, Any]] | None = self._ask(
                name, lambda stream: transfer.unseal_canary(stream, subject, keyring)
            )
            if found is None:
                return None
            self._local.write_canary(address, weights_digest, found[2])
            return found[2]

    def write_canary(self, address: Address, weights_digest: str, record: dict[str, Any]) -> bool:
        """Record a canary here, and send it afterwards."""
        written = self._local.write_canary(address, weights_digest, record)
        self._sender.send_canary(address, weights_digest, record)
        return written

    def read_calls(self, identity: str) -> CallsRecord | None:
        """See `Store`; the local store knows them."""
        return self._local.read_calls(identity)

    def add_calls(self, identity: str, calls: ObservedCalls) -> bool:
        """See `Store`; the local store keeps them."""
        return self._local.add_calls(identity, calls)

    def read_declaration(self, identity: str) -> Declaration | None:
        """See `Store`; the local store knows it."""
        return self._local.read_declaration(identity)

    def write_declaration(self, identity: str, declaration: Declaration) -> bool:
        """See `Store`; the local store keeps it."""
        return self._local.write_declaration(identity, declaration)

    def close(self) -> None:
        """Send what is pending, for as long as the end of a process may take; then close the local store."""
        self.write_back.close()
        self._local.close()

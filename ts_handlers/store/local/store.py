"""A store in a local folder; `ts_handlers.store.local.layout` names what lies in it."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import shutil
import stat
import tempfile
import time
import weakref
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any, Literal

from ts_handlers.errors import StoreError
from ts_handlers.key.cache_key import explain
from ts_handlers.store.address import Address, entry_path, safe_name
from ts_handlers.store.base import Corrupt, Hit, Miss, NoPendingWrites
from ts_handlers.store.entry import MANIFEST, Manifest, read_manifest, verify_files, write_manifest
from ts_handlers.store.local.layout import ENTRIES, LEASES, SHARED, STAGING
from ts_handlers.store.local.lease import Lease, hold_lease
from ts_handlers.store.local.observed import ObservedRecords
from ts_handlers.store.local.ownership import NotOursError, OwnedTree, check_path, make_private_folders
from ts_handlers.store.local.records import Records
from ts_handlers.store.local.trash import move_aside
from ts_handlers.store.local.usage import InUse, record_use
from ts_handlers.store.local.verified import KnownDigests
from ts_handlers.store.outside import names_of_manifest
from ts_handlers.system.files import close_if_same, fsync
from ts_handlers.system.locked_directory import collect_directories, make_locked_directory

logger = logging.getLogger(__name__)

PUBLISH_ATTEMPTS = 3
READ_ATTEMPTS = 3
RETRY_SECONDS = 0.02
_DAMAGE = (errno.EISDIR, errno.ELOOP)
"""Errors that say something about an entry; others, as of missing permissions or of a disk that does not answer, say
something about this process or this moment."""


class LocalStore(Records, ObservedRecords):
    """Entries below `root`, which is made if it does not exist.

    The entries that a store object has found or published stay locked against eviction until it is closed or
    garbage-collected, so keep it for as long as their files may be read.

    Parameters
    ----------
    root:
        The folder.
    verify:
        ``changed`` hashes a file again only when it may have changed since its digest was computed; ``always`` hashes
        every file at every lookup.

    Raises
    ------
    StoreError
        The root cannot be made or read, or it or a folder above it belongs to another user or is writable by others
        (see `ts_handlers.store.local.ownership`): an entry is code, so whoever can write here can run code in the
        worker.
    """

    def __init__(
        self,
        root: str | Path,
        trusted_folders: Collection[str] = (),
        *,
        verify: Literal["always", "changed"] = "changed",
    ) -> None:
        self.notes: list[str] = []
        self.write_back = NoPendingWrites()
        self.keep_alive: Any = None  # what removes a temporary root when the store is dropped
        super().__init__(Path(root).expanduser().absolute())
        self._verify = verify
        self._trusted_folders = tuple(trusted_folders)
        self._in_use = InUse()
        weakref.finalize(self, self._in_use.close)
        self._open_root()

    def _open_root(self) -> None:
        """Make the root, and look whether it and the way to it can be used; a disk is asked again before it is not."""
        problem: OSError | None = None
        for attempt in range(READ_ATTEMPTS):
            if attempt:
                time.sleep(RETRY_SECONDS)
            try:
                for folder in [*reversed(self.root.parents), self.root]:
                    if not folder.exists():
                        folder.mkdir(mode=0o700, exist_ok=True)
                os.listdir(self.root)
                check_path(self.root, self._trusted_folders)
                return
            except OSError as error:
                problem = error
                if isinstance(error, (PermissionError, NotADirectoryError, FileExistsError)):
                    break
        assert problem is not None
        raise StoreError(
            f"the store {self.root} cannot be used: {problem.strerror or problem}; make it a readable folder, or name "
            "another with handler.ts_handlers.store or TS_HANDLERS_CACHE"
        ) from problem

    @property
    def name(self) -> str:
        """The root, as messages show it."""
        return str(self.root)

    @property
    def state_directory(self) -> Path:
        """The root."""
        return self.root

    @property
    def shared_directory(self) -> Path:
        """See `ts_handlers.store.base.Store`."""
        return self.root / SHARED

    def close(self) -> None:
        """Give up the locks on entries."""
        self._in_use.close()

    def _entry(self, address: Address) -> Path:
        return self.root / ENTRIES / entry_path(address)

    def has(self, address: Address) -> bool:
        """Whether there is an entry, right or damaged; reads none of its files."""
        return os.path.exists(self._entry(address) / MANIFEST)

    def lookup(self, address: Address) -> Hit | Miss | Corrupt:
        """Find an entry and verify every byte of it; a damaged one is moved aside.

        A hit is locked against eviction, and its use recorded. An entry that goes meanwhile is a miss. What cannot be
        read, or has another digest, is read again before it is called damaged; an entry whose disk does not answer
        stays, for the next start.
        """
        return self._lookup(address)

    def _lookup(self, address: Address, *, in_the_way: bool = False) -> Hit | Miss | Corrupt:
        """See `lookup`; what stands in the way of a new entry is moved aside also when its disk does not answer."""
        directory = self._entry(address)
        problem: Exception | None = None
        for attempt in range(READ_ATTEMPTS):
            if attempt:
                time.sleep(RETRY_SECONDS)
            try:
                check_path(self.root, self._trusted_folders)
                with OwnedTree(self.root) as tree:
                    tree.check_folder(self._relative(directory.parent))
                    found = self._read(address, directory, tree)
            except (StoreError, NotOursError) as error:  # of a folder above: moving the entry would mend nothing
                return Corrupt(str(error))
            except (FileNotFoundError, NotADirectoryError):
                if not self._in_use.acquire(directory):  # otherwise it has been published at this moment
                    return Miss(self._nearest(address))
            except OSError as error:
                self._in_use.release(directory)
                if error.errno == errno.ENAMETOOLONG or (isinstance(error, PermissionError) and not self.has(address)):
                    return Miss(self._nearest(address))
                problem = error
                if isinstance(error, PermissionError) or error.errno in _DAMAGE:
                    break
            except ValueError as error:
                problem = error
            else:
                return found
        return self._give_up(address, problem, in_the_way)

    def _read(self, address: Address, directory: Path, tree: OwnedTree) -> Hit | Miss | Corrupt:
        """Lock and verify an entry. Raises `ValueError` for damage, and `OSError`."""
        if not self._in_use.acquire(directory):
            # Published by one rename, so a folder without a manifest was never complete here.
            if _is_folder(directory) and not _has_manifest(directory) and self.discard(address, "no manifest"):
                return Corrupt("the entry has no manifest")
            return Miss(self._nearest(address))
        name = self._relative(directory)
        try:
            tree.check_folder(name)
            tree.status(f"{name}/{MANIFEST}")
            manifest = read_manifest(directory)
            if manifest.cache_key != address.key:
                raise ValueError("the manifest's key is another one than its folder's")
            self._verify_files(directory, manifest, lambda file: tree.status(f"{name}/{file}"))
        except NotOursError as error:
            self.discard(address, str(error))
            return Corrupt(str(error))
        record_use(self.root, address.key.digest)
        return Hit(directory, manifest)

    def _give_up(self, address: Address, problem: Exception | None, in_the_way: bool) -> Miss | Corrupt:
        """What a lookup finds that has failed each time in the same way."""
        directory = self._entry(address)
        if not isinstance(problem, OSError):
            return Corrupt(str(problem)) if self.discard(address, str(problem)) else Miss(self._nearest(address))
        reason = f"the entry cannot be read: {problem}"
        if problem.errno in _DAMAGE or (in_the_way and problem.errno == errno.EIO):
            with contextlib.suppress(OSError):
                self._in_use.acquire(directory)
            self.discard(address, reason)
        self._in_use.release(directory)
        return Corrupt(reason)

    def _relative(self, path: Path) -> str:
        return path.relative_to(self.root).as_posix()

    def _verify_files(self, directory: Path, manifest: Manifest, status: Callable[[str], os.stat_result]) -> None:
        if self._verify == "always":
            verify_files(directory, manifest, status=status)
            return
        known = KnownDigests(self.root, directory)
        verify_files(directory, manifest, known.digest_file, status)
        known.save()

    def _manifests(self, address: Address) -> list[Path]:
        """Manifests of every entry of this model, as far as they can be read."""
        try:
            return list(self.root.joinpath(ENTRIES, safe_name(address.model)).glob(f"*/*/*/{MANIFEST}"))
        except OSError:
            return []

    def _nearest(self, address: Address) -> tuple[str, ...]:
        """Names of the parts in which the most similar entry of this model differs."""
        best: tuple[str, ...] = ()
        for path in self._manifests(address):
            try:
                other = read_manifest(path.parent)
            except (OSError, ValueError):
                continue
            if other.backend != address.key["backend"]:
                continue
            parts = tuple(name for name, _, _ in explain(address.key, other.cache_key))
            if not best or len(parts) < len(best):
                best = parts
        return best

    def build_estimate(self, address: Address) -> float | None:
        """Seconds that the latest build of this model and backend took, or None."""
        latest: tuple[float, float] | None = None
        for path in self._manifests(address):
            try:
                manifest, modified = read_manifest(path.parent), path.stat().st_mtime
            except (OSError, ValueError):
                continue
            if manifest.backend == address.key["backend"] and (latest is None or modified > latest[0]):
                latest = (modified, sum(manifest.build_ms.values()) / 1000)
        return latest[1] if latest else None

    @contextlib.contextmanager
    def staging(self, address: Address) -> Iterator[Path]:
        """A private directory inside the store, or in the temporary folder when the store cannot be written.

        In the latter case the entry cannot be published, but it can be served by this process.
        """
        base = self.root / STAGING
        descriptor, identity = -1, None
        try:
            make_private_folders(base, self.root)
            collect_directories(base)
            directory, descriptor = make_locked_directory(base, f"{address.key.digest}-")
            identity = os.fstat(descriptor)
        except OSError as error:
            logger.warning("the store %s cannot be written (%s); building in the temporary folder", self.root, error)
            directory = Path(tempfile.mkdtemp(prefix="ts_handlers-staging-"))
        try:
            yield directory
        finally:
            if directory.exists():
                shutil.rmtree(directory, ignore_errors=True)
            if identity is not None:
                close_if_same(descriptor, identity)

    def publish(self, address: Address, staging: Path, manifest: Manifest) -> Path:
        """Write the manifest, flush everything to the disk, and rename the staged directory into place.

        Returns
        -------
        The published entry's directory. When another process has published the same key meanwhile, that entry stays
        and this one is dropped.

        Raises
        ------
        StoreError
            The disk is full or the store cannot be written; the staged directory is still usable.
        """
        target = self._entry(address)
        try:
            write_manifest(staging, manifest)
            self._in_use.acquire(staging)  # from its first moment no eviction takes it from this process
            for attempt in range(PUBLISH_ATTEMPTS):
                try:
                    make_private_folders(target.parent, self.root)
                    os.rename(staging, target)
                    break
                except OSError:
                    # What stands there was written by somebody else and may be damaged: it is used as any entry is.
                    found = self._lookup(address, in_the_way=True)
                    if isinstance(found, Hit):
                        self._in_use.release(staging)
                        return found.directory
                    # What stood there has been moved aside now, or an eviction has taken it or the empty folders above.
                    if attempt + 1 == PUBLISH_ATTEMPTS:
                        raise
        except OSError as error:
            self._in_use.release(staging)
            raise StoreError(f"the entry could not be published in {self.root}: {error}") from error
        # Those who do not know the names compute another key.
        self.write_outside(address.key.base.digest, names_of_manifest(manifest.recorded))
        with contextlib.suppress(OSError):  # it is visible and complete; only its survival of a power cut is open
            fsync(target.parent)
        return target

    def discard(self, address: Address, reason: str) -> bool:
        """Move an entry aside, with its reason, so that it is not found again.

        Only the entry that this store object has found, or one without a readable manifest, is moved.

        Returns
        -------
        False when it is gone already; another process may have published a new one, which stays.
        """
        directory = self._entry(address)
        if not self._is_judged(directory):
            return False
        logger.warning("entry %s is not used: %s", address.key.digest, reason)
        try:
            directory = move_aside(self.root, directory, reason, self._is_judged)
        except FileNotFoundError:
            return False
        except OSError as error:
            logger.warning("entry %s cannot be moved aside: %s", address.key.digest, error)
        self._in_use.release(directory)
        return True

    def _is_judged(self, directory: Path) -> bool:
        """Whether an entry is what this object has found damaged, and not what others have published since."""
        return self._in_use.holds(directory) or not _has_manifest(directory)

    @contextlib.contextmanager
    def lease(self, address: Address, estimate: float | None) -> Iterator[Lease]:
        """The right to build this key; see `ts_handlers.store.local.lease`."""
        with hold_lease(self.root / LEASES, address.key.digest, estimate) as lease:
            yield lease


def _is_folder(path: Path) -> bool:
    try:
        return stat.S_ISDIR(os.lstat(path).st_mode)
    except OSError:
        return False


def _has_manifest(directory: Path) -> bool:
    """Whether there is a plain manifest; True also where that cannot be told."""
    try:
        return stat.S_ISREG(os.lstat(directory / MANIFEST).st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:
        return True

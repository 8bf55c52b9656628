"""Remembered digests of files, so that an unchanged file is not hashed at every start.

A digest is remembered together with the file's device, inode, size, modification time and change time as they were when
it was computed, in ``<root>/verified/``, one record for each entry or weights file::

    record := SHA-256 of the rest in hex, newline, JSON: Record below

A remembered digest is used only while all of these are the same; docs/decisions/0012-verified-digests.md says why that
is safe, and against what it is not.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
from pathlib import Path

import msgspec

from ts_handlers.errors import UNDECODABLE
from ts_handlers.key.digests import digest_stream, digest_text
from ts_handlers.store.local.layout import VERIFIED
from ts_handlers.system.decoding import decode_json
from ts_handlers.system.files import write_atomically
from ts_handlers.system.ownership import is_private_folder, only_we_write
from ts_handlers.system.processes import boot_id

RACY_SECONDS = 2.0  # a file changed so recently could change again within the same tick of its clock
REHASH_SECONDS = 7 * 86400.0  # after this a file is hashed again although it looks unchanged, because disks rot

# File systems whose change time tells every change at once. On network file systems it may be cached for a minute.
LOCAL_FILE_SYSTEMS = frozenset({"bcachefs", "btrfs", "ext2", "ext3", "ext4", "f2fs", "overlay", "tmpfs", "xfs", "zfs"})

Stamp = tuple[int, int, int, int, int]  # device, inode, size, mtime_ns, ctime_ns


class KnownDigest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One file's digest, its stamp, and when it was computed, in seconds since the epoch."""

    stamp: Stamp
    sha256: str
    computed: float


class Record(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What is remembered of one subject: an entry or a single file. `boot` is the kernel's boot id."""

    boot: str
    subject: str
    files: dict[str, KnownDigest]


class KnownDigests:
    """The remembered digests of one subject, which is a directory or a file.

    Parameters
    ----------
    root:
        The store's root.
    subject:
        What the record is about; links are followed, so that a folder is known under each of its names.
    """

    def __init__(self, root: Path, subject: Path) -> None:
        self._folder = root / VERIFIED
        self._subject = os.path.realpath(subject)
        self._name = record_name(self._subject)
        self._boot = boot_id()  # empty where there is none, and then nothing is remembered
        self._changed = False
        self._files: dict[str, KnownDigest] = {}
        record = read_record(self._folder / self._name) if is_private_folder(self._folder, or_roots=True) else None
        if record is not None and record.boot == self._boot and record.subject == self._subject:
            self._files = record.files

    def digest_file(self, path: Path) -> str:
        """SHA-256 of a file: the remembered one if the file has not changed since, otherwise computed."""
        name = os.path.realpath(path)
        known = self._files.get(name)
        if known is None or known.stamp != _stamp(os.stat(name)):
            return self.compute(path)
        recent = 0 <= time.time() - known.computed <= REHASH_SECONDS
        return known.sha256 if recent else self.compute(path)

    def compute(self, path: Path) -> str:
        """SHA-256 of a file, computed now and remembered if that is safe."""
        with open(path, "rb", buffering=0) as file:
            before = os.fstat(file.fileno())
            digest = digest_stream(file)
            after = os.fstat(file.fileno())
            now = time.time()
            settled = now - max(after.st_ctime, after.st_mtime) >= RACY_SECONDS
            if self._boot and settled and _stamp(before) == _stamp(after) and _is_local(file.fileno()):
                self._files[os.path.realpath(path)] = KnownDigest(_stamp(after), digest, now)
                self._changed = True
        return digest

    def save(self) -> None:
        """Write what was computed since; a store that cannot be written remembers nothing."""
        if not self._changed:
            return
        payload = msgspec.json.encode(Record(self._boot, self._subject, self._files))
        data = hashlib.sha256(payload).hexdigest().encode() + b"\n" + payload
        with contextlib.suppress(OSError):
            self._folder.mkdir(mode=0o700, exist_ok=True)
            if not is_private_folder(self._folder, or_roots=True):
                return
            write_atomically(self._folder / self._name, data, mode=0o600)
        self._changed = False


def known_digest(root: Path, path: Path) -> str:
    """SHA-256 of one file, remembered in the store `root` between processes."""
    known = KnownDigests(root, path)
    digest = known.digest_file(path)
    known.save()
    return digest


def record_name(subject: str) -> str:
    """File name of a subject's record."""
    return digest_text(subject)[:32]


def read_record(path: Path) -> Record | None:
    """Read a record; None when there is none, it is damaged, or somebody else could have written it."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
        with open(descriptor, "rb") as file:
            if not only_we_write(os.fstat(descriptor)):
                return None
            digest, _, payload = file.read().partition(b"\n")
        if hashlib.sha256(payload).hexdigest().encode() != digest:
            return None
        return decode_json(payload, Record)
    except (OSError, *UNDECODABLE):
        return None


def _stamp(status: os.stat_result) -> Stamp:
    return (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


def _is_local(descriptor: int) -> bool:
    """Whether an open file lies on a file system of `LOCAL_FILE_SYSTEMS`, by the mount that it was opened through."""
    try:
        facts = Path(f"/proc/self/fdinfo/{descriptor}").read_text()
        mount = next(line.split()[1] for line in facts.splitlines() if line.startswith("mnt_id:"))
        with open("/proc/self/mountinfo") as table:
            for line in table:
                if line.split(maxsplit=1)[0] == mount:
                    return line.rpartition(" - ")[2].split()[0] in LOCAL_FILE_SYSTEMS
    except (OSError, StopIteration, IndexError):
        return False
    return False

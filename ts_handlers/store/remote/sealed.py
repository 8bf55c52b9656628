"""Sealed files: the travel format. One file carries one entry, one canary record or one bundle between hosts.

To seal is to write files in this format with their digests and a signature over them; `SealedReader` checks both.

Format (ABNF, RFC 5234; LF is %x0A)::

    sealed      = magic size LF header LF check LF body
    magic       = "ts_handlers sealed 1" LF
    size        = 1*7DIGIT                  ; bytes of header
    header      = JSON object               ; Header below, keys sorted: the same contents give the same bytes
    check       = sha256 SP signature       ; both over magic and header
    sha256      = 64HEXDIG                  ; tells damage from forgery, and damage where nothing is signed
    signature   = "-" / key-id SP base64    ; "-": not signed
    key-id      = 16HEXDIG                  ; see ts_handlers.store.remote.signing
    base64      = 88( ALPHA / DIGIT / "+" / "/" / "=" )   ; Ed25519
    body        = *OCTET                    ; the files' bytes, in the order of their names

The header holds the size and SHA-256 of every file, so the signature covers all of them. A reader checks the signature
before it interprets the header, the header before it makes a file, and the digest of each file while it writes it; it
makes the files in a private folder that nobody uses before the last one was right. There is no compression, no link, no
mode and no owner in the format: what is not a plain file with a safe name cannot be expressed or is refused.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

import msgspec

from ts_handlers.errors import UNDECODABLE, RefusedError, StoreError
from ts_handlers.key.digests import CHUNK
from ts_handlers.store.entry import FileRecord
from ts_handlers.store.remote.signing import Keyring
from ts_handlers.system.decoding import decode_json

MAGIC = b"ts_handlers sealed 1\n"
HEADER_LIMIT = 9_999_999  # bytes: a hundred thousand files; Inductor's largest entries hold a few thousand
FILES_LIMIT = 65_536
_CHECK_LIMIT = 256
_PRINTABLE = re.compile(r"[^\x00-\x1f\x7f\\]{1,1024}")


class Header(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The header of a sealed file: what it holds.

    Attributes
    ----------
    kind: ``entry``, ``canary`` or ``bundle``.
    subject: the address of an entry, or key and weights digest of a canary record. Signed with the rest, so that
        an object cannot be passed off as another one.
    files: size in bytes and SHA-256 of each file, by relative path.
    """

    kind: str
    subject: str
    files: dict[str, FileRecord]


def seal(target: BinaryIO, kind: str, subject: str, sources: Mapping[str, Path | bytes], keyring: Keyring) -> None:
    """Write a sealed file.

    Parameters
    ----------
    sources:
        Each file's relative path, and its bytes or where they lie.
    keyring:
        Signs, if it has a signing key.

    Raises
    ------
    StoreError
        A file changed while it was read.
    """
    records = {name: _record(source) for name, source in sources.items()}
    header = msgspec.json.encode(Header(kind, subject, records), order="deterministic")
    check = f"{hashlib.sha256(MAGIC + header).hexdigest()} {keyring.sign(MAGIC + header)}"
    target.write(MAGIC + b"%d\n" % len(header) + header + b"\n" + check.encode() + b"\n")
    for name in sorted(sources):
        source, digest = sources[name], hashlib.sha256()
        if isinstance(source, bytes):
            target.write(source)
            continue
        with open(source, "rb") as file:
            while chunk := file.read(CHUNK):
                digest.update(chunk)
                target.write(chunk)
        if digest.hexdigest() != records[name].sha256:
            raise StoreError(f"{source} changed while it was read; nothing was sent")


def _record(source: Path | bytes) -> FileRecord:
    if isinstance(source, bytes):
        return FileRecord(len(source), hashlib.sha256(source).hexdigest())
    digest, size = hashlib.sha256(), 0
    with open(source, "rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
            size += len(chunk)
    return FileRecord(size, digest.hexdigest())


class SealedReader:
    """A sealed file whose signature and header have been checked; its body has not been read yet.

    Parameters
    ----------
    stream:
        Read from start to end once, without seeking.
    keyring:
        Decides whether the signature, or its absence, is accepted.
    kind, subject:
        What it must be; None for `subject` accepts any.

    Raises
    ------
    RefusedError
        With the reason; nothing has been written.
    """

    def __init__(self, stream: BinaryIO, keyring: Keyring, kind: str, subject: str | None = None) -> None:
        self._stream = stream
        if _read(stream, len(MAGIC)) != MAGIC:
            raise RefusedError("it is not a sealed file of this format")
        size = _read_line(stream, len(str(HEADER_LIMIT)))
        if not size.isdigit():
            raise RefusedError("the size of its header is not a number")
        raw = _read(stream, int(size))
        if _read(stream, 1) != b"\n":
            raise RefusedError("its header is longer than it says")
        digest, _, signature = _read_line(stream, _CHECK_LIMIT).decode("ascii", "replace").partition(" ")
        if digest != hashlib.sha256(MAGIC + raw).hexdigest():
            raise RefusedError("its header is damaged: it has another digest than it says")
        keyring.verify(MAGIC + raw, signature)
        self.header = _parse(raw)
        if self.header.kind != kind:
            raise RefusedError(f"expected kind {kind!r}, found {self.header.kind!r}")
        if subject is not None and self.header.subject != subject:
            raise RefusedError(f"it is of {self.header.subject!r}, expected {subject!r}")

    @property
    def size(self) -> int:
        """Bytes of all files together."""
        return sum(record.size for record in self.header.files.values())

    def extract(self, directory: Path) -> None:
        """Write the files into an empty private directory; the caller removes it when this raises.

        Raises
        ------
        RefusedError
            A file's bytes are not those of the header, or there are fewer or more of them.
        StoreError
            The disk has no room for them.
        """
        free = shutil.disk_usage(directory).free
        if self.size > free:
            raise StoreError(f"{self.size} bytes are needed in {directory}, {free} are free")
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
        for name in sorted(self.header.files):
            path = directory / name
            try:
                path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                descriptor = os.open(path, flags, 0o600)
            except OSError as error:
                raise StoreError(f"{name} cannot be made: {error}") from error
            with open(descriptor, "wb", buffering=0) as file:
                self._copy(name, file)
        self._end()

    def verify(self) -> None:
        """Read the body to its end and compare it with the header; write nothing.

        Raises
        ------
        RefusedError
            The bytes are not those of the header, or there are fewer or more of them.
        """
        for name in sorted(self.header.files):
            self._copy(name, None)
        self._end()

    def read(self, name: str, limit: int) -> bytes:
        """The bytes of the only file, which must be called `name` and hold at most `limit` bytes.

        Raises
        ------
        RefusedError
            It is another file, a larger one, or its bytes are not those of the header.
        """
        if list(self.header.files) != [name] or self.size > limit:
            raise RefusedError(f"expected one file {name!r} of at most {limit} bytes, found {self.size} bytes")
        data = _read(self._stream, self.size)
        if hashlib.sha256(data).hexdigest() != self.header.files[name].sha256:
            raise RefusedError(f"{name}: its digest differs from the header's")
        self._end()
        return data

    def _copy(self, name: str, target: io.FileIO | None) -> None:
        record, digest = self.header.files[name], hashlib.sha256()
        remaining = record.size
        while remaining:
            chunk = _read(self._stream, min(CHUNK, remaining))
            remaining -= len(chunk)
            digest.update(chunk)
            if target is not None:
                try:
                    while chunk:
                        chunk = chunk[target.write(chunk) :]
                except OSError as error:  # of this host's disk, and not of where the bytes come from
                    raise StoreError(f"{name} cannot be written: {error}") from error
        if digest.hexdigest() != record.sha256:
            raise RefusedError(f"{name}: its digest differs from the header's")

    def _end(self) -> None:
        if self._stream.read(1):
            raise RefusedError("there is something after its last file")


def _parse(raw: bytes) -> Header:
    try:
        header = decode_json(raw, Header)
    except UNDECODABLE as error:
        raise RefusedError(f"its header is damaged: {error}") from error
    if len(header.files) > FILES_LIMIT:
        raise RefusedError(f"it holds {len(header.files)} files, at most {FILES_LIMIT} are accepted")
    folders: set[str] = set()
    for name, record in header.files.items():
        check_name(name)
        if record.size < 0:
            raise RefusedError(f"{name}: {record.size} is no size")
        parts = name.split("/")
        folders.update("/".join(parts[:count]) for count in range(1, len(parts)))
    if both := folders & header.files.keys():
        raise RefusedError(f"{min(both)!r} is both a file and a folder")
    return header


def check_name(name: str) -> None:
    """Check that a file name is a plain relative path of printable characters.

    Raises
    ------
    RefusedError
        It is not.

    Examples
    --------
    >>> check_name("code/model.so")
    >>> check_name("../model.so")
    Traceback (most recent call last):
    ts_handlers.errors.RefusedError: the file name '../model.so' is not a plain relative path
    """
    parts = name.split("/")
    plain = _PRINTABLE.fullmatch(name) and not {"", ".", ".."} & set(parts)
    try:
        short = all(len(part.encode()) <= 255 for part in parts)
    except UnicodeEncodeError:  # half of a surrogate pair
        short = False
    if not plain or not short:
        raise RefusedError(f"the file name {name!r} is not a plain relative path")


def _read(stream: BinaryIO, count: int) -> bytes:
    """Exactly `count` bytes."""
    chunks = []
    while count:
        chunk = stream.read(min(count, CHUNK))
        if not chunk:
            raise RefusedError("it is truncated")
        chunks.append(chunk)
        count -= len(chunk)
    return b"".join(chunks)


def _read_line(stream: BinaryIO, limit: int) -> bytes:
    """The bytes before the next line feed, at most `limit`."""
    line = b""
    while (byte := _read(stream, 1)) != b"\n":
        line += byte
        if len(line) > limit:
            raise RefusedError("one of its first lines is too long")
    return line

"""One entry on disk: the manifest and the files it lists.

Layout::

    entry      := directory, immutable once published
    directory  := manifest.json file*
    manifest   := JSON object: Manifest below, with `seal` = SHA-256 over the same JSON with an empty `seal`
    file       := any path below the directory that `files` lists, with its size in bytes and SHA-256

Files that the manifest does not list are never opened. Readers check the manifest's digest, then every listed file's
size and digest, before anything is loaded: an entry is code.
"""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec

from ts_handlers.errors import UNDECODABLE
from ts_handlers.key.cache_key import FORMAT, CacheKey
from ts_handlers.key.digests import digest_file, digest_text
from ts_handlers.key.names import NO_NAMES, Names
from ts_handlers.store.outside import RECORDED, encode_names
from ts_handlers.system.decoding import decode_json
from ts_handlers.system.files import fsync
from ts_handlers.version import __version__

MANIFEST = "manifest.json"


class FileRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Size in bytes and SHA-256 of one file."""

    size: int
    sha256: str


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What an entry says about itself.

    Attributes
    ----------
    format: layout version.
    key: the key's parts in order.
    backend: name of the backend that built it.
    artifact: the backend's own description of its files.
    files: every file, by path relative to the entry.
    recorded: facts that are not keyed: time of the build, host, compiler, package version.
    build_ms: duration of each build phase in milliseconds.
    digest: SHA-256 over this manifest with an empty digest; names this very entry. Called ``seal`` on disk.
    """

    format: str
    key: tuple[tuple[str, str], ...]
    backend: str
    artifact: dict[str, Any]
    files: dict[str, FileRecord]
    recorded: dict[str, str]
    build_ms: dict[str, float]
    digest: str = msgspec.field(default="", name="seal")

    @property
    def cache_key(self) -> CacheKey:
        """The key as an object."""
        return CacheKey(self.key)

    def with_digest(self) -> Manifest:
        """The same manifest with its digest."""
        return msgspec.structs.replace(self, digest=_digest(self))


def _digest(manifest: Manifest) -> str:
    without = msgspec.structs.replace(manifest, digest="")
    return digest_text(msgspec.json.encode(without, order="deterministic").decode())


def list_files(directory: Path) -> dict[str, FileRecord]:
    """Size and digest of every file below a staged directory.

    Raises
    ------
    ValueError
        A symbolic link or a special file is among them.
    """
    files = {}
    for path in sorted(directory.rglob("*")):
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            raise ValueError(f"{path.name} is neither a file nor a directory; entries hold plain files only")
        if path.is_file() and path.name != MANIFEST:
            name = path.relative_to(directory).as_posix()
            files[name] = FileRecord(path.stat().st_size, digest_file(path))
    return files


def new_manifest(
    key: CacheKey,
    artifact: dict[str, Any],
    directory: Path,
    build_ms: Mapping[str, float],
    names: Names = NO_NAMES,
) -> Manifest:
    """The manifest of what a build has left in a directory.

    Parameters
    ----------
    key, artifact, build_ms:
        See `Manifest`; `artifact` is what the backend's `build` has returned.
    directory:
        Holds the artifact's files.
    names:
        What making the model reads from outside its archive; whoever gets the entry needs them to find it.
    """
    from ts_handlers.key.fingerprint import compiler_identity, python_identity  # imports torch, which listing needs not

    recorded = {
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "host": platform.node(),
        "kernel": platform.release(),
        "package": __version__,
        "compiler": compiler_identity(),
        "python": python_identity(),
    }
    if names:
        recorded[RECORDED] = encode_names(names).decode()
    return Manifest(
        format=key["format"],
        key=key.parts,
        backend=key["backend"],
        artifact=json.loads(json.dumps(artifact)),  # so that a builder uses the very description that a reader will
        files=list_files(directory),
        recorded=recorded,
        build_ms={name: round(value, 1) for name, value in build_ms.items()},
    )


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Write the manifest with its digest, and flush every file of the entry to the disk."""
    (directory / MANIFEST).write_bytes(
        msgspec.json.format(msgspec.json.encode(manifest.with_digest(), order="deterministic"), indent=1)
    )
    for path in [*directory.rglob("*"), directory]:
        mode = path.stat().st_mode
        if mode & 0o022:  # by the umask
            path.chmod(mode & ~0o022 & 0o7777)
        fsync(path)


def read_manifest(directory: Path) -> Manifest:
    """Read and check a manifest.

    Raises
    ------
    ValueError
        It is unreadable, of another format, or its digest is another one.
    """
    try:
        manifest = decode_json((directory / MANIFEST).read_bytes(), Manifest)
    except UNDECODABLE as error:
        raise ValueError(f"manifest.json is damaged: {error}") from error
    if manifest.format != FORMAT:
        raise ValueError(f"manifest.json has format {manifest.format!r}, expected {FORMAT!r}")
    if manifest.digest != _digest(manifest):
        raise ValueError("manifest.json was changed after it was written")
    return manifest


def verify_files(
    directory: Path,
    manifest: Manifest,
    digest: Callable[[Path], str] = digest_file,
    status: Callable[[str], os.stat_result] | None = None,
) -> None:
    """Check every listed file's size and digest.

    Parameters
    ----------
    digest:
        Computes, or remembers, a file's SHA-256; see `ts_handlers.store.local.verified`.
    status:
        The status of a plain file of the entry by its name, or a `ValueError`; None looks at the path.

    Raises
    ------
    ValueError
        A file is missing, is not a plain file inside the entry, or has another size or digest.
    """
    real = os.path.realpath(directory)
    for name, record in manifest.files.items():
        path = directory / name
        if ".." in Path(name).parts or os.path.isabs(name):
            raise ValueError(f"manifest.json lists {name!r}, which lies outside the entry")
        if status is not None:
            size = status(name).st_size
        elif os.path.realpath(path) != os.path.join(real, name) or not path.is_file():
            raise ValueError(f"{name} is missing or not a plain file")
        else:
            size = path.stat().st_size
        if size != record.size:
            raise ValueError(f"{name}: expected {record.size} bytes, found {size}")
        if digest(path) != record.sha256:
            raise ValueError(f"{name}: its digest differs from the manifest's")

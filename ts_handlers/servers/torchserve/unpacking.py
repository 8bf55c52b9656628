"""Unpack model archives as TorchServe does, and refuse what would leave the folder or fill the disk.

An archive is a zip file (``.mar``), a tar file (``.tgz``, ``.tar.gz``) or a folder; ``MAR-INF/MANIFEST.json`` lies at
its top or, in tar files, in its only folder.

What is unpacked may be a hundred times as large as the archive, or `SMALL_BYTES`; it leaves `RESERVE_BYTES` of the disk
free, and consists of at most `FILES_LIMIT` files. Holes of a sparse member count like bytes.
"""

from __future__ import annotations

import contextlib
import gzip
import os
import shutil
import stat
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import IO, Any, cast

from ts_handlers.errors import ModelError, one_line
from ts_handlers.system.files import NAME_LIMIT

MANIFEST = PurePosixPath("MAR-INF/MANIFEST.json")
RATIO_LIMIT = 100
SMALL_BYTES = 1 << 30
RESERVE_BYTES = 16 << 20
FILES_LIMIT = 65_536
_CHUNK = 1 << 20
_HEADER_LIMIT = 16 << 20
"""Bytes that are read at once from a tar file: a header that claims more is none."""


@contextlib.contextmanager
def unpacked(archive: str | Path) -> Iterator[Path]:
    """The folder of an archive's files: the given one, or a temporary one that is removed at the end of the block.

    Raises
    ------
    ModelError
        It is no archive, is damaged or too large, or holds a link, a special file or a name that leaves the folder.
    """
    path = Path(archive)
    if path.is_dir():
        yield _root(path.absolute(), path)
        return
    with tempfile.TemporaryDirectory(prefix="ts_handlers-archive-") as temporary:
        try:
            _unpack(path, Path(temporary))
            root = _root(Path(temporary), path)
        except ModelError:
            raise
        except Exception as error:  # the readers of zip and tar files do not say what they raise for damaged bytes
            reason = f"{type(error).__name__}: {one_line(error)}"
            raise ModelError(f"the archive {path} cannot be unpacked: {reason}") from error
        yield root


def _unpack(path: Path, target: Path) -> None:
    stated = max(SMALL_BYTES, RATIO_LIMIT * path.stat().st_size)
    free = shutil.disk_usage(target).free - RESERVE_BYTES
    left = min(stated, free)
    for count, (name, source) in enumerate(_files(path)):
        if count >= FILES_LIMIT:
            raise ModelError(f"the archive {path} holds more than {FILES_LIMIT} files")
        place = target / _safe(name, path)
        place.parent.mkdir(parents=True, exist_ok=True)
        with source, place.open("xb") as file:
            while chunk := source.read(_CHUNK):
                left -= len(chunk)
                if left < 0 and free < stated:
                    raise ModelError(
                        f"the archive {path} does not fit into {tempfile.gettempdir()}, where {free} bytes can be "
                        "used; free some, or name another temporary folder (TMPDIR)"
                    )
                if left < 0:
                    raise ModelError(
                        f"the archive {path} holds more than {stated} bytes, {RATIO_LIMIT} times its own size; it is "
                        "not unpacked"
                    )
                file.write(chunk)


def _files(path: Path) -> Iterator[tuple[str, IO[bytes]]]:
    """Name and content of each file; folders are left out, everything else is refused."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            for info in archive.infolist():
                kind = stat.S_IFMT(info.external_attr >> 16)
                if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
                    raise ModelError(f"the archive {path} holds {info.filename!r}, which is a link or special file")
                _safe(info.filename, path)
                if not info.is_dir():
                    yield info.filename, archive.open(info)
        return
    with path.open("rb") as file:
        compressed = file.read(2) == b"\x1f\x8b"
        file.seek(0)
        content: Any = gzip.GzipFile(fileobj=file) if compressed else file
        try:
            tar = tarfile.open(fileobj=cast(IO[bytes], _Bounded(content)), mode="r:")  # noqa: SIM115
        except (tarfile.ReadError, EOFError) as error:
            raise ModelError(
                f"{path} is no model archive: expected a zip file (.mar), a .tgz file or a folder ({one_line(error)})"
            ) from error
        with tar:
            for member in tar:
                if not (member.isfile() or member.isdir()):
                    raise ModelError(f"the archive {path} holds {member.name!r}, which is a link or special file")
                _safe(member.name, path)
                source = tar.extractfile(member)
                if source is not None:
                    yield member.name, source


class _Bounded:
    """A file of which nobody reads much at once, as `tarfile` does for a header that claims to be large."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.seek, self.tell = file.seek, file.tell

    def read(self, count: int = -1) -> bytes:
        if not 0 <= count <= _HEADER_LIMIT:
            raise tarfile.ReadError(f"a header of {count} bytes")
        return self._file.read(count)


def _safe(name: str, archive: Path) -> str:
    parts = PurePosixPath(name).parts
    if name.startswith("/") or ".." in parts or "\\" in name or "\0" in name:
        raise ModelError(f"the archive {archive} holds the name {name!r}, which leaves its folder; it is not unpacked")
    if any(len(os.fsencode(part)) > NAME_LIMIT for part in parts):
        raise ModelError(f"the archive {archive} holds a name of more than {NAME_LIMIT} bytes: {name[:80]!r}...")
    return name


def _root(directory: Path, archive: Path) -> Path:
    if (directory / MANIFEST).is_file():
        return directory
    folders = [path for path in directory.iterdir() if (path / MANIFEST).is_file()]
    if len(folders) != 1:
        raise ModelError(f"{archive} holds no {MANIFEST}; make it with torch-model-archiver")
    return folders[0]

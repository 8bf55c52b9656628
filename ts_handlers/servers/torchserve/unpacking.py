"""Unpack model archives as TorchServe does, and refuse what would leave the folder.

An archive is a zip file (``.mar``), a tar file (``.tgz``, ``.tar.gz``) or a folder; ``MAR-INF/MANIFEST.json`` lies at
its top or, in tar files, in its only folder.
"""

from __future__ import annotations

import contextlib
import shutil
import stat
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import IO

from ts_handlers.errors import ModelError

MANIFEST = PurePosixPath("MAR-INF/MANIFEST.json")


@contextlib.contextmanager
def unpacked(archive: str | Path) -> Iterator[Path]:
    """The folder of an archive's files: the given one, or a temporary one that is removed at the end of the block.

    Raises
    ------
    ModelError
        It is no archive, is damaged, or holds a link, a special file or a name that leaves the folder.
    """
    path = Path(archive)
    if path.is_dir():
        yield _root(path.absolute(), path)
        return
    with tempfile.TemporaryDirectory(prefix="ts_handlers-archive-") as temporary:
        target = Path(temporary)
        try:
            for name, source in _files(path):
                place = target / _safe(name, path)
                place.parent.mkdir(parents=True, exist_ok=True)
                with source, place.open("xb") as file:
                    shutil.copyfileobj(source, file, 1 << 20)
        except (OSError, EOFError, zipfile.BadZipFile, tarfile.TarError) as error:
            raise ModelError(f"the archive {path} cannot be unpacked: {type(error).__name__}: {error}") from error
        yield _root(target, path)


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
    elif tarfile.is_tarfile(path):
        with tarfile.open(path) as tar:
            for member in tar:
                if not (member.isfile() or member.isdir()):
                    raise ModelError(f"the archive {path} holds {member.name!r}, which is a link or special file")
                _safe(member.name, path)
                content = tar.extractfile(member)
                if content is not None:
                    yield member.name, content
    else:
        raise ModelError(f"{path} is no model archive: expected a zip file (.mar), a .tgz file or a folder")


def _safe(name: str, archive: Path) -> str:
    parts = PurePosixPath(name).parts
    if name.startswith("/") or ".." in parts or "\\" in name or "\0" in name:
        raise ModelError(f"the archive {archive} holds the name {name!r}, which leaves its folder; it is not unpacked")
    return name


def _root(directory: Path, archive: Path) -> Path:
    if (directory / MANIFEST).is_file():
        return directory
    folders = [path for path in directory.iterdir() if (path / MANIFEST).is_file()]
    if len(folders) != 1:
        raise ModelError(f"{archive} holds no {MANIFEST}; make it with torch-model-archiver")
    return folders[0]

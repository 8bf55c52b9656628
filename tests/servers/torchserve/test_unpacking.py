"""Model archives unpacked: every format, and nothing that leaves the folder."""

from __future__ import annotations

import json
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest

from tests.support.archive_files import files_of, write_tar, write_zip
from ts_handlers.errors import ModelError
from ts_handlers.servers.torchserve.unpacking import unpacked


@pytest.fixture
def folder(archive: Path) -> Path:
    """An unpacked archive."""
    (archive / "MAR-INF").mkdir()
    (archive / "MAR-INF" / "MANIFEST.json").write_text(json.dumps({"model": {"modelName": "model"}}))
    return archive


def test_every_archive_format_is_unpacked(folder: Path, tmp_path: Path) -> None:
    files = files_of(folder)
    zipped = write_zip(tmp_path / "model.mar", files)
    tar = write_tar(tmp_path / "model.tgz", {f"model/{name}": content for name, content in files.items()})
    for path in (folder, zipped, tar):
        with unpacked(path) as directory:
            assert files_of(directory) == files
        assert directory.exists() == (path == folder)


@pytest.mark.parametrize("name", ["../evil.py", "/evil.py", "a/../../evil.py", "a\\..\\evil.py"])
@pytest.mark.parametrize("write", [write_zip, write_tar])
def test_name_that_leaves_the_folder_is_refused(write: Any, name: str, tmp_path: Path) -> None:
    path = write(tmp_path / "model.mar", {"MAR-INF/MANIFEST.json": b"{}", name: b"import os"})
    with pytest.raises(ModelError, match="leaves its folder"), unpacked(path):
        pass
    assert list(tmp_path.rglob("evil.py")) == []


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE])
def test_link_or_special_file_is_refused(kind: bytes, tmp_path: Path) -> None:
    info = tarfile.TarInfo("link")
    info.type, info.linkname = kind, "/etc/passwd"
    path = write_tar(tmp_path / "model.tgz", {"MAR-INF/MANIFEST.json": b"{}"}, info)
    with pytest.raises(ModelError, match="'link', which is a link or special file"), unpacked(path):
        pass
    zipped = zipfile.ZipInfo("link")
    zipped.external_attr = 0o120777 << 16
    with zipfile.ZipFile(tmp_path / "model.mar", "w") as archive:
        archive.writestr(zipped, "/etc/passwd")
    with pytest.raises(ModelError, match="'link', which is a link or special file"), unpacked(tmp_path / "model.mar"):
        pass


def test_what_is_no_archive_is_refused(tmp_path: Path, folder: Path) -> None:
    (tmp_path / "text.mar").write_text("no archive")
    whole = write_zip(tmp_path / "whole.mar", files_of(folder)).read_bytes()
    (tmp_path / "cut.mar").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "empty").mkdir()
    twice = tmp_path / "twice.mar"
    with zipfile.ZipFile(twice, "w") as archive:
        archive.writestr("a", "1")
        with pytest.warns(UserWarning, match="Duplicate"):
            archive.writestr("a", "2")
    for name, reason in {
        "text.mar": "expected a zip file",
        "cut.mar": "expected a zip file|cannot be unpacked",
        "empty": "holds no MAR-INF/MANIFEST.json",
        "twice.mar": "cannot be unpacked: FileExistsError",
        "absent.mar": "absent.mar",
    }.items():
        with pytest.raises(ModelError, match=reason), unpacked(tmp_path / name):
            pass

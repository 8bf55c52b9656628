"""Who could write a file or folder, by owner and mode."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ts_handlers.system.ownership import is_private_folder, only_we_write


@pytest.mark.parametrize(("mode", "private"), [(0o700, True), (0o755, True), (0o770, False), (0o702, False)])
def test_a_folder_that_others_write_is_not_private(mode: int, private: bool, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    folder.chmod(mode)
    assert (is_private_folder(folder), only_we_write(os.stat(folder))) == (private, private)


def test_only_folders_of_this_user_are_private(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path)
    assert [is_private_folder(tmp_path / name) for name in ("file", "link", "nothing")] == [False] * 3
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 4711)
    assert not is_private_folder(tmp_path)

"""Directories of living processes are kept, those of dead ones collected, whenever the collector comes."""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.support.subprocesses import finish, start_python
from ts_handlers.system.locked_directory import collect_directories, make_locked_directory


def test_kept_while_locked_and_collected_afterwards(tmp_path: Path) -> None:
    directory, descriptor = make_locked_directory(tmp_path, "work-")
    (directory / "file").write_text("x")
    assert directory.stat().st_mode & 0o077 == 0
    collect_directories(tmp_path, "work-*")
    assert (directory / "file").exists()
    os.close(descriptor)
    collect_directories(tmp_path, "other-*")
    assert directory.exists()
    collect_directories(tmp_path, "work-*")
    assert not directory.exists()


def test_files_and_links_are_left_alone(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    parent = tmp_path / "parent"
    parent.mkdir()
    (parent / "file").write_text("x")
    (parent / "link").symlink_to(elsewhere)
    collect_directories(parent)
    assert sorted(path.name for path in parent.iterdir()) == ["file", "link"]
    assert elsewhere.is_dir()


def test_collector_between_making_and_locking(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock, taken = fcntl.flock, []

    def late(descriptor: int, operation: int) -> Any:
        if not taken:
            taken.extend(tmp_path.iterdir())
            shutil.rmtree(taken[0])
        return lock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    directory, _ = make_locked_directory(tmp_path, "work-")
    assert directory.is_dir()
    assert directory not in taken


@pytest.mark.processes
def test_directory_of_a_killed_process_is_collected(tmp_path: Path) -> None:
    code = """
        import os, pathlib, signal, sys
        from ts_handlers.system.locked_directory import make_locked_directory
        make_locked_directory(pathlib.Path(sys.argv[1]), "work-")
        os.kill(os.getpid(), signal.SIGKILL)
    """
    finish(start_python(code, tmp_path), -signal.SIGKILL)
    assert len(list(tmp_path.iterdir())) == 1
    collect_directories(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.processes
def test_many_processes_at_once_each_keep_their_own(tmp_path: Path) -> None:
    code = """
        import pathlib, sys
        from ts_handlers.system.locked_directory import collect_directories, make_locked_directory
        parent, lost = pathlib.Path(sys.argv[1]), 0
        for _ in range(200):
            collect_directories(parent)
            directory, descriptor = make_locked_directory(parent, "work-")
            collect_directories(parent)
            lost += not directory.is_dir()
        print(lost)
    """
    children = [start_python(code, tmp_path) for _ in range(4)]
    assert [finish(child).strip() for child in children] == ["0"] * 4

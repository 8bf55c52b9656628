"""Shared files: whole or not at all, and locked only while they are the ones at their path."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import pytest

from ts_handlers.system.files import atomic_file, is_at, is_temporary, lock, open_locked, write_atomically
from ts_handlers.system.locked_directory import make_locked_directory


@pytest.mark.parametrize("durable", [False, True])
@pytest.mark.parametrize("replace", [False, True])
def test_a_file_appears_when_its_block_ends(durable: bool, replace: bool, tmp_path: Path) -> None:
    path = tmp_path / "file"
    with atomic_file(path, durable=durable, replace=replace) as file:
        file.write(b"whole")
        (temporary,) = os.listdir(tmp_path)
        assert is_temporary(temporary)
        assert str(os.getpid()) in temporary
    assert os.listdir(tmp_path) == ["file"]
    assert path.read_bytes() == b"whole"


@pytest.mark.parametrize("before", [None, b"before"])
def test_a_block_that_fails_leaves_what_was_there(before: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "file"
    if before is not None:
        path.write_bytes(before)

    def fail() -> None:
        with atomic_file(path) as file:
            file.write(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert [other.read_bytes() for other in tmp_path.iterdir()] == ([] if before is None else [before])


def test_a_file_that_is_there_is_replaced_only_if_asked(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_atomically(path, "first")
    write_atomically(path, "ä")
    with pytest.raises(FileExistsError), atomic_file(path, replace=False) as file:
        file.write(b"third")
    assert path.read_text("utf-8") == "ä"
    assert os.listdir(tmp_path) == ["file"]


def test_processes_with_one_number_do_not_share_a_temporary_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with atomic_file(path) as outer:
        outer.write(b"outer")
        write_atomically(path, b"inner")
    assert path.read_bytes() == b"outer"


def test_the_mode_is_that_of_the_argument_and_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        write_atomically(tmp_path / "open", b"")
        write_atomically(tmp_path / "closed", b"", mode=0o600)
    finally:
        os.umask(before)
    assert [(tmp_path / name).stat().st_mode & 0o777 for name in ("open", "closed")] == [0o644, 0o600]


def test_one_holder_or_several_readers(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.touch()
    held = open_locked(path)
    for shared in (False, True):
        with pytest.raises(BlockingIOError):
            open_locked(path, shared=shared)
    os.close(held)
    readers = [open_locked(path, shared=True) for _ in range(2)]
    with pytest.raises(BlockingIOError):
        open_locked(path)
    for descriptor in readers:
        os.close(descriptor)


@pytest.mark.parametrize("replaced", [False, True])
def test_a_file_that_went_before_it_was_locked_is_not_locked(replaced: bool, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.touch()
    descriptor = os.open(path, os.O_RDONLY)
    assert is_at(descriptor, path)
    path.unlink()
    if replaced:
        path.touch()
    with pytest.raises(FileNotFoundError):
        lock(descriptor, path, wait=True)
    os.close(descriptor)


def test_two_containers_with_one_pid_never_share_a_temporary_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "getpid", lambda: 1)
    with contextlib.ExitStack() as stack:
        for _ in range(20):
            stack.enter_context(atomic_file(tmp_path / "facts"))
        assert len(list(tmp_path.iterdir())) == 20
    directories = {make_locked_directory(tmp_path, "key-")[0] for _ in range(20)}
    assert len(directories) == 20


@pytest.mark.parametrize("name", ["n" * 255, "名" * 85])
def test_a_long_name_leaves_room_for_the_temporary_one(name: str, tmp_path: Path) -> None:
    write_atomically(tmp_path / name, b"facts")
    assert [path.name for path in tmp_path.iterdir()] == [name]

"""The files of the engine cache: what is damaged, half written or foreign is not there, and nothing raises."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ts_handlers.backends.torch_tensorrt.engine_cache import MAGIC, EngineFiles

KEY = "ab" * 32
BLOB = bytes(range(256)) * 64


def engine_files(folder: Path, **options: Any) -> EngineFiles:
    return EngineFiles(folder / "engines", writable=options.get("writable", True))


def test_what_was_saved_is_loaded_and_counted(tmp_path: Path) -> None:
    files = engine_files(tmp_path)
    assert files.load(KEY) is None
    assert files.load(KEY) is None
    files.save(KEY, BLOB)
    assert files.load(KEY) == BLOB
    assert (files.hits, files.missed, files.saved) == (1, {KEY}, 1)
    assert os.listdir(tmp_path / "engines") == [f"{KEY}.engine"]


@given(st.integers(0, len(MAGIC) + 32 + len(BLOB) - 1), st.integers(1, 255))
def test_no_flipped_byte_is_accepted(tmp_path_factory: pytest.TempPathFactory, position: int, change: int) -> None:
    files = engine_files(tmp_path_factory.mktemp("flipped"))
    files.save(KEY, BLOB)
    data = bytearray(files.path(KEY).read_bytes())
    data[position] ^= change
    files.path(KEY).write_bytes(data)
    assert files.load(KEY) is None
    assert (files.hits, files.missed) == (0, {KEY})


@pytest.mark.parametrize("length", [0, 1, 8, 39, 40, 41, 1000])
def test_truncated_files_are_missing(tmp_path: Path, length: int) -> None:
    files = engine_files(tmp_path)
    files.save(KEY, BLOB)
    files.path(KEY).write_bytes(files.path(KEY).read_bytes()[:length])
    assert files.load(KEY) is None


def test_an_empty_engine_is_none(tmp_path: Path) -> None:
    files = engine_files(tmp_path)
    files.save(KEY, b"")
    assert files.load(KEY) is None


def test_a_sealed_entry_is_not_written_to(tmp_path: Path) -> None:
    files = engine_files(tmp_path, writable=False)
    files.save(KEY, BLOB)
    assert not (tmp_path / "engines").exists()
    assert (files.saved, files.load(KEY)) == (1, None)


def test_a_folder_that_cannot_be_written_costs_the_engine_only(tmp_path: Path) -> None:
    (tmp_path / "engines").write_text("a file where the folder should be")
    files = engine_files(tmp_path)
    files.save(KEY, BLOB)
    assert files.load(KEY) is None


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    files = engine_files(tmp_path)
    monkeypatch.setattr(os, "replace", full)
    files.save(KEY, BLOB)
    assert os.listdir(tmp_path / "engines") == []


@pytest.mark.processes
def test_a_death_between_write_and_rename_leaves_no_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = engine_files(tmp_path)
    child = os.fork()
    if child == 0:
        monkeypatch.setattr(os, "replace", lambda *_: os._exit(7))
        files.save(KEY, BLOB)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    (left,) = os.listdir(tmp_path / "engines")
    assert left.startswith(".")
    assert files.load(KEY) is None
    files.save(KEY, BLOB)
    assert files.load(KEY) == BLOB


@pytest.mark.processes
def test_writers_at_the_same_time_leave_one_whole_engine(tmp_path: Path) -> None:
    blobs = [bytes([number]) * (1 << 20) for number in range(4)]
    files = engine_files(tmp_path)
    children = []
    for blob in blobs:
        child = os.fork()
        if child == 0:
            for _ in range(20):
                files.save(KEY, blob)
            os._exit(0)
        children.append(child)
    seen = []
    while children:
        found = files.load(KEY)
        if found is not None:
            seen.append(found in blobs)
        done, _ = os.waitpid(children[0], os.WNOHANG)
        if done:
            children.remove(done)
    assert files.load(KEY) in blobs
    assert all(seen)
    assert len(os.listdir(tmp_path / "engines")) == 1

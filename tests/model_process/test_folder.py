"""Who may start a model's process, and where the others find it."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

import pytest

from ts_handlers.errors import StoreError
from ts_handlers.model_process.folder import Failure, Folder, Status, folder_of, sweep


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A temporary folder of its own, with a path that is too long for a socket's."""
    path = tmp_path / ("long" * 30)
    path.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(path))
    return path


def test_equal_identities_share_a_folder_and_others_do_not() -> None:
    one, two, three = folder_of({"a": 1, "b": 2}), folder_of({"b": 2, "a": 1}), folder_of({"a": 1, "b": 3})
    assert one.path == two.path != three.path


def test_one_holder_at_a_time() -> None:
    folder = folder_of({})
    lock = folder.take_lock()
    assert lock is not None
    assert Folder(folder.path).take_lock() is None
    os.close(lock)
    again = folder.take_lock()
    assert again is not None
    os.close(again)


def test_a_lock_on_a_folder_that_was_swept_away_is_taken_again(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = folder_of({})
    lock = folder.take_lock()
    assert lock is not None
    (folder.path / "lock").unlink()  # as `sweep` does, which holds the lock meanwhile
    fresh = folder.take_lock()
    assert fresh is not None
    assert os.path.samestat(os.fstat(fresh), (folder.path / "lock").stat())
    os.close(lock)
    os.close(fresh)


def test_connecting_and_listening_work_with_any_path(temporary: Path) -> None:
    folder = folder_of({})
    assert folder.connect() is None  # not even the folder is there
    lock = folder.take_lock()
    assert lock is not None
    assert len(str(folder.path / "socket")) > 107
    listener = folder.listen()
    connection = folder.connect()
    assert connection is not None
    connection.close()
    folder.stop_listening()
    assert folder.connect() is None
    listener.close()
    os.close(lock)


def test_sweeping_leaves_what_is_held_or_new() -> None:
    held, old, new = (folder_of({"n": n}) for n in range(3))
    locks = [folder.take_lock() for folder in (held, old, new)]
    for lock in locks[1:]:
        assert lock is not None
        os.close(lock)
    long_ago = time.time() - 3600
    for folder in (held, old):
        os.utime(folder.path, (long_ago, long_ago))
    sweep()
    assert [folder.path.exists() for folder in (held, old, new)] == [True, False, True]
    assert locks[0] is not None
    os.close(locks[0])


def test_what_a_process_says_is_read_and_damage_is_nothing() -> None:
    folder = folder_of({})
    lock = folder.take_lock()
    assert lock is not None
    os.close(lock)
    assert folder.read_status() is None
    assert folder.status_time() == 0.0
    status = Status(3, "failed", error=Failure("ModelError", "no"))
    folder.write_status(status)
    assert folder.read_status() == status
    assert folder.status_time() > 0
    (folder.path / "status").write_bytes(b'{"pid": "x"')
    assert folder.read_status() is None
    folder.forget_status()
    folder.forget_status()


def test_a_folder_that_others_can_write_to_is_refused(temporary: Path) -> None:
    folder_of({})
    (private,) = temporary.iterdir()
    private.chmod(0o770)
    with pytest.raises(StoreError, match=r"mode 0700.*found.*0770.*TMPDIR"):
        folder_of({})
    private.rmdir()
    private.symlink_to(temporary)
    with pytest.raises(StoreError, match="must be a folder"):
        folder_of({})


def test_a_temporary_folder_that_was_emptied_is_made_again(temporary: Path) -> None:
    folder = folder_of({})
    shutil.rmtree(folder.path.parent)
    lock = folder.take_lock()
    assert lock is not None
    assert folder.path.parent.stat().st_mode & 0o777 == 0o700
    os.close(lock)

"""Who may start a model's process, and where the others find it."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from ts_handlers.errors import StoreError
from ts_handlers.model_process.folder import Failure, Folder, Holder, Status, folder_of, sweep, write_holder


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


def open_folder(path: Path) -> None:
    path.mkdir()
    path.chmod(0o770)


def others_folder(path: Path) -> None:
    path.mkdir()
    os.chown(path, 12345, 12345)


TAKEN: dict[str, Callable[[Path], None]] = {
    "open to others": open_folder,
    "a link": lambda path: path.symlink_to(path.parent),
    "a dangling link": lambda path: path.symlink_to("nowhere"),
    "a file": lambda path: path.touch(),
    "another user's": others_folder,
}


@pytest.mark.parametrize("case", TAKEN)
def test_a_name_that_was_taken_does_not_stop_the_start(case: str, temporary: Path) -> None:
    if case == "another user's" and os.geteuid() != 0:
        pytest.skip("only root gives folders away")
    usual = temporary / f"ts_handlers-{os.geteuid()}"
    TAKEN[case](usual)
    others = temporary / f"{usual.name}-00000000000000000000-forged"
    if os.geteuid() == 0:
        others_folder(others)  # the next name, too
    one, two = folder_of({}), folder_of({})
    assert one.path == two.path
    assert one.path.parent not in (usual, others)
    assert one.path.parent.parent == temporary
    assert one.path.parent.stat().st_mode & 0o777 == 0o700
    lock = one.take_lock()
    assert lock is not None
    assert two.take_lock() is None
    os.close(lock)


def test_processes_that_find_the_name_taken_at_once_meet(temporary: Path) -> None:
    (temporary / f"ts_handlers-{os.geteuid()}").touch()
    with ThreadPoolExecutor(8) as pool:
        found = {folder.path for folder in pool.map(lambda _: folder_of({}), range(32))}
    assert len(found) == 1


def test_a_folder_that_was_replaced_by_another_users_is_not_used(temporary: Path) -> None:
    folder = folder_of({})
    folder.path.parent.rmdir()
    folder.path.parent.symlink_to(temporary)
    with pytest.raises(StoreError, match="was replaced by another user's"):
        folder.take_lock()


def test_a_lock_is_given_up_only_for_the_holder_that_it_names() -> None:
    folder = folder_of({})
    lock = folder.take_lock()
    assert lock is not None
    assert folder.sign() is None
    write_holder(lock, Holder(17, 123456))
    sign = folder.sign()
    assert sign is not None
    assert sign[0] == (17, 123456)
    os.utime(lock, ns=(5, 5))
    assert folder.sign() == ((17, 123456), 5)
    folder.give_up(Holder(17, 123457))
    assert not folder.is_free()
    folder.give_up(Holder(17, 123456))
    assert folder.is_free()
    os.close(lock)


def test_how_a_process_ended_is_told_of_that_process_alone() -> None:
    folder = folder_of({})
    lock = folder.take_lock()
    assert lock is not None
    os.close(lock)
    folder.write_ended(Holder(3, 4), -9)
    folder.write_killed(Holder(3, 5), "silent")
    assert (folder.ended(Holder(3, 4)), folder.ended(Holder(3, 5))) == (-9, None)
    assert (folder.killed(Holder(3, 4)), folder.killed(Holder(3, 5))) == (None, "silent")


def test_a_temporary_folder_that_was_emptied_is_made_again(temporary: Path) -> None:
    folder = folder_of({})
    shutil.rmtree(folder.path.parent)
    lock = folder.take_lock()
    assert lock is not None
    assert folder.path.parent.stat().st_mode & 0o777 == 0o700
    os.close(lock)

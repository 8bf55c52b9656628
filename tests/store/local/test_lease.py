"""Leases: one holder at a time, and no waiting where no lock can be made."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import threading
from pathlib import Path

import pytest
from filelock import FileLock, Timeout

from ts_handlers.store.local import lease as lease_module
from ts_handlers.store.local.lease import hold_lease


def test_one_holder_at_a_time_and_waiters_say_for_whom(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease_module, "LOG_EVERY_SECONDS", 0.0)
    caplog.set_level(logging.INFO)
    order: list[str] = []

    def wait() -> None:
        with hold_lease(tmp_path, "key", None):
            order.append("waiter")

    with hold_lease(tmp_path, "key", 12.0) as lease:
        lease.report(phase="compile")
        thread = threading.Thread(target=wait)
        thread.start()
        while not any("still waiting" in record.message for record in caplog.records):
            thread.join(0.05)
        order.append("holder")
    thread.join()
    assert order == ["holder", "waiter"]
    text = "\n".join(record.getMessage() for record in caplog.records)
    assert "another process builds key" in text
    assert "phase compile" in text
    assert "12 s expected" in text


def test_status_is_readable_while_held_and_removed_afterwards(tmp_path: Path) -> None:
    with hold_lease(tmp_path, "key", None) as lease:
        lease.report(phase="export")
        assert json.loads((tmp_path / "key.json").read_text())["phase"] == "export"
    assert not (tmp_path / "key.json").exists()


def test_different_keys_do_not_wait_for_each_other(tmp_path: Path) -> None:
    with hold_lease(tmp_path, "a", None), hold_lease(tmp_path, "b", None) as second:
        assert second.waited < 60


def test_block_runs_without_a_lease_where_no_lock_can_be_made(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    ran = []
    with hold_lease(tmp_path / "file", "key", None) as lease:
        lease.report(phase="compile")
        ran.append(lease)
    assert len(ran) == 1
    assert "building without one" in caplog.text


@pytest.mark.parametrize("broken", [False, True], ids=["locked", "without a lock"])
def test_errors_of_the_block_come_through_and_free_the_lease(tmp_path: Path, broken: bool) -> None:
    directory = tmp_path / "leases"
    if broken:
        directory.write_text("")
    with pytest.raises(KeyError, match="from the block"), hold_lease(directory, "key", None):
        raise KeyError("from the block")
    with hold_lease(directory, "key", None):
        pass


@pytest.mark.parametrize(
    "text",
    [b"{half", b"\xff", b"[" * 50_000, b"[]", b'{"started": 1' + b"0" * 400 + b', "pid": 1, "phase": "x"}'],
    ids=["truncated", "no UTF-8", "nested", "list", "huge"],
)
def test_damaged_status_does_not_stop_a_waiter(text: bytes, tmp_path: Path) -> None:
    (tmp_path / "key.json").write_bytes(text)
    assert "waited 3 s" in lease_module.describe_holder(tmp_path, "key", 3.0, None)


def test_a_descriptor_that_foreign_code_closed_is_nobodys(tmp_path: Path) -> None:
    """Native code of a build closes all descriptors, and the lock's number is somebody else's file afterwards."""
    with hold_lease(tmp_path / "leases", "key", None):
        links = Path("/proc/self/fd").iterdir()
        ours = [int(path.name) for path in links if os.path.realpath(path) == str(tmp_path / "leases" / "key.lock")]
        assert len(ours) == 1
        os.close(ours[0])
        foreign = [os.open(tmp_path / "foreign", os.O_RDWR | os.O_CREAT) for _ in range(20)]
        assert ours[0] in foreign
        fcntl.flock(ours[0], fcntl.LOCK_EX)
    other = os.open(tmp_path / "foreign", os.O_RDONLY)
    with pytest.raises(BlockingIOError):
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    for descriptor in (*foreign, other):
        os.close(descriptor)
    with hold_lease(tmp_path / "leases", "key", None):
        pass


def test_a_lock_file_that_goes_is_made_again(tmp_path: Path) -> None:
    """As the collector removes one, while it holds it."""
    with hold_lease(tmp_path, "key", None):
        (tmp_path / "key.lock").unlink()
        with hold_lease(tmp_path, "key", None) as other:
            assert (tmp_path / "key.lock").exists()
            assert other.waited < 60


def test_a_lease_and_the_lock_of_an_older_version_exclude_each_other(tmp_path: Path) -> None:
    with FileLock(tmp_path / "key.lock"), pytest.MonkeyPatch.context() as patched:
        patched.setattr(lease_module, "POLL_SECONDS", 0.0)
        assert lease_module._take(tmp_path / "key.lock") is None
    with hold_lease(tmp_path, "key", None), pytest.raises(Timeout):
        FileLock(tmp_path / "key.lock").acquire(timeout=0)

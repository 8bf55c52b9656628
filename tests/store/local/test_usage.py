"""Locks of readers and the record of uses."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.support.entries import address, publish
from tests.support.marks import needs_root
from ts_handlers.store.base import Hit, Miss
from ts_handlers.store.local import store as local
from ts_handlers.store.local.store import LocalStore
from ts_handlers.store.local.usage import InUse, exclusive, in_use, read_use, record_use, touch_use


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "store")


def test_entry_is_in_use_from_its_publication_until_the_store_object_goes(tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "store")
    directory = publish(store, address())
    assert in_use(directory)
    del store
    assert not in_use(directory)
    store = LocalStore(tmp_path / "store")
    assert isinstance(store.lookup(address()), Hit)
    assert isinstance(store.lookup(address()), Hit)
    assert in_use(directory)
    del store
    assert not in_use(directory)


def test_readers_do_not_exclude_each_other_but_exclude_a_remover(store: LocalStore) -> None:
    directory = publish(store, address())
    first, second = InUse(), InUse()
    assert first.acquire(directory)
    assert second.acquire(directory)
    store.close()
    for reader in (first, second):
        with exclusive(directory) as refusal:
            assert refusal == "in use"
        reader.close()
    with exclusive(directory) as refusal:
        assert refusal is None


def test_entry_that_is_removed_while_a_reader_waits_for_its_lock_is_a_miss(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = publish(store, address())
    store.close()
    with exclusive(directory) as refusal:
        assert refusal is None
        monkeypatch.setattr("time.sleep", lambda seconds: shutil.rmtree(directory))
        assert store.lookup(address()) == Miss(())


def test_entry_that_goes_while_it_is_read_without_a_lock_is_a_miss(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ts_handlers.store.local.usage.RETRY_SECONDS", 0.0)
    directory = publish(store, address())
    store.close()

    def evicted(*arguments: object) -> None:
        shutil.rmtree(directory)
        raise FileNotFoundError(directory / "code")

    with exclusive(directory) as refusal:
        assert refusal is None
        assert isinstance(store.lookup(address()), Hit)
        monkeypatch.setattr(local, "verify_files", evicted)
        assert store.lookup(address()) == Miss(())


def test_closing_gives_up_the_locks_and_may_be_repeated(store: LocalStore) -> None:
    directory = publish(store, address())
    assert store.write_back.wait(0)
    for _ in range(2):
        store.close()
        assert not in_use(directory)
    assert isinstance(store.lookup(address()), Hit)
    assert in_use(directory)


def test_discarded_entry_is_not_held_any_more(store: LocalStore) -> None:
    publish(store, address())
    store.discard(address(), "a reason")
    (moved,) = (store.root / "trash").iterdir()
    assert not in_use(moved)


def test_damage_that_somebody_else_has_replaced_meanwhile_is_not_moved_aside(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process moves the entry aside and publishes it again while this one is still hashing it."""
    where = address()
    publish(store, where)
    other = LocalStore(store.root)

    def replaced(*arguments: object) -> None:
        patched.undo()
        assert isinstance(other.lookup(where), Hit)
        assert other.discard(where, "damaged")
        publish(other, where)
        raise ValueError("code/model.so is missing or not a plain file")

    with monkeypatch.context() as patched:
        patched.setattr(local, "verify_files", replaced)
        assert isinstance(store.lookup(where), Hit)  # read again
    assert isinstance(store.lookup(where), Hit)


def test_uses_are_counted_and_dated(store: LocalStore) -> None:
    key = address().key.digest
    assert read_use(store.root, key) == (None, 0)
    for _ in range(3):
        record_use(store.root, key)
    os.utime(store.root / "usage" / key, (1000, 1000))
    assert read_use(store.root, key) == (1000.0, 3)
    touch_use(store.root, key)
    last, uses = read_use(store.root, key)
    assert uses == 3
    assert last is not None
    assert last > 1000
    assert (store.root / "usage").stat().st_mode & 0o077 == 0


def test_lookup_of_a_hit_is_a_use_and_a_miss_is_none(store: LocalStore) -> None:
    where = address()
    store.lookup(where)
    publish(store, where)
    assert read_use(store.root, where.key.digest)[1] == 0
    store.lookup(where)
    store.lookup(where)
    assert read_use(store.root, where.key.digest)[1] == 2


@needs_root
def test_read_only_store_serves_locks_and_records_nothing(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k,mode=700", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("a tmpfs cannot be mounted here")
    try:
        directory = publish(LocalStore(disk / "store"), address())
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        store = LocalStore(disk / "store")
        assert isinstance(store.lookup(address()), Hit)
        assert in_use(directory)
        assert read_use(store.root, address().key.digest) == (None, 0)
        store.close()
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)

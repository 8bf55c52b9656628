"""Digests remembered between processes: used only while the file cannot have changed."""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.support.entries import address, publish
from tests.support.marks import needs_root
from ts_handlers.store.base import Corrupt, Hit
from ts_handlers.store.local import verified
from ts_handlers.store.local.store import LocalStore
from ts_handlers.store.local.verified import KnownDigests, known_digest, read_record, record_name

pytestmark = pytest.mark.usefixtures("clock")

HOUR = 3600.0
TICK = 0.05  # longer than the granularity of change times; `clock` has taken away the protection against that


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "store")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Sets the time that `KnownDigests` sees, as an offset to now; one minute ahead at first, so files look settled."""

    def shift(seconds: float) -> None:
        monkeypatch.setattr(verified, "time", SimpleNamespace(time=lambda: now + seconds))

    now = time.time()
    shift(60)
    return shift


def weights(tmp_path: Path, content: bytes = b"weights") -> Path:
    path = tmp_path / "model.pt"
    path.write_bytes(content)
    return path


def digest_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_unchanged_file_is_hashed_once(store: LocalStore, tmp_path: Path, hashed: list[str]) -> None:
    path = weights(tmp_path)
    assert [known_digest(store.root, path) for _ in range(3)] == [digest_of(path)] * 3
    assert len(hashed) == 1


def _edit_in_place(path: Path) -> None:
    """Another content of the same size, with the old modification time put back."""
    before = path.stat()
    with open(path, "r+b") as file:
        file.write(b"W")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def _edit_through_a_mapping(path: Path) -> None:
    import mmap

    with open(path, "r+b") as file, mmap.mmap(file.fileno(), 0) as mapped:
        mapped[0:1] = b"W"


def _replace(path: Path) -> None:
    before = path.stat()
    other = path.with_name("other")
    other.write_bytes(b"Weights")
    os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
    os.replace(other, path)


@pytest.mark.parametrize("change", [_edit_in_place, _edit_through_a_mapping, _replace])
def test_changed_file_is_hashed_again_although_size_and_modification_time_are_the_same(
    change: Callable[[Path], None],
    store: LocalStore,
    tmp_path: Path,
    hashed: list[str],
) -> None:
    path = weights(tmp_path)
    first = known_digest(store.root, path)
    time.sleep(TICK)
    change(path)
    second = known_digest(store.root, path)
    assert second == digest_of(path) != first
    assert len(hashed) == 2


@pytest.mark.parametrize("seconds", [0.5, -HOUR], ids=["just written", "clock set back"])
def test_file_that_may_change_within_the_same_tick_is_not_remembered(
    seconds: float, store: LocalStore, tmp_path: Path, hashed: list[str], clock: Callable[[float], None]
) -> None:
    path = weights(tmp_path)
    clock(seconds)
    assert known_digest(store.root, path) == known_digest(store.root, path) == digest_of(path)
    assert len(hashed) == 2
    assert not (store.root / "verified").exists()


@pytest.mark.parametrize("days", [8, -1], ids=["a week later", "computed in the future"])
def test_file_is_hashed_again_after_a_week(
    days: int, store: LocalStore, tmp_path: Path, hashed: list[str], clock: Callable[[float], None]
) -> None:
    path = weights(tmp_path)
    known_digest(store.root, path)
    clock(60 + days * 24 * HOUR)
    known_digest(store.root, path)
    assert len(hashed) == 2


def test_record_of_another_boot_counts_for_nothing(
    store: LocalStore,
    tmp_path: Path,
    hashed: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = weights(tmp_path)
    known_digest(store.root, path)
    monkeypatch.setattr(verified, "boot_id", lambda: "another")
    known_digest(store.root, path)
    assert len(hashed) == 2
    monkeypatch.setattr(verified, "boot_id", lambda: "")
    assert KnownDigests(store.root, path).digest_file(path) == digest_of(path)
    assert len(hashed) == 3


def test_record_of_a_store_copied_elsewhere_counts_for_nothing(
    store: LocalStore, tmp_path: Path, hashed: list[str]
) -> None:
    publish(store, address())
    assert isinstance(store.lookup(address()), Hit)
    assert isinstance(store.lookup(address()), Hit)
    assert len(hashed) == 2  # two files, once
    shutil.copytree(store.root, tmp_path / "copy")
    assert isinstance(LocalStore(tmp_path / "copy").lookup(address()), Hit)
    assert len(hashed) == 4


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


def _forge(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b'"sha256":"', b'"sha256":"0'))


@pytest.mark.parametrize(
    "change",
    [
        _truncate,
        _forge,
        lambda path: path.write_bytes(b""),
        lambda path: path.chmod(0o666),
        lambda path: path.parent.chmod(0o777),
        pytest.param(lambda path: os.chown(path, 54321, 54321), marks=needs_root),
    ],
    ids=["truncated", "edited", "emptied", "writable by others", "folder writable by others", "of another user"],
)
def test_record_that_is_damaged_or_not_ours_counts_for_nothing(
    change: Callable[[Path], object],
    store: LocalStore,
    tmp_path: Path,
    hashed: list[str],
) -> None:
    path = weights(tmp_path)
    known_digest(store.root, path)
    (record,) = (store.root / "verified").iterdir()
    change(record)
    assert known_digest(store.root, path) == digest_of(path)
    assert len(hashed) == 2


def test_nothing_is_remembered_on_a_network_file_system(
    store: LocalStore,
    tmp_path: Path,
    hashed: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(verified, "LOCAL_FILE_SYSTEMS", frozenset({"of another kind"}))
    path = weights(tmp_path)
    known_digest(store.root, path)
    known_digest(store.root, path)
    assert len(hashed) == 2


def test_folder_that_is_linked_under_a_new_name_at_each_start_is_known(
    store: LocalStore, tmp_path: Path, hashed: list[str]
) -> None:
    path = weights(tmp_path)
    known_digest(store.root, path)
    (tmp_path / "link").symlink_to(tmp_path)
    assert known_digest(store.root, tmp_path / "link" / "model.pt") == digest_of(path)
    assert len(hashed) == 1
    record = read_record(store.root / "verified" / record_name(str(path)))
    assert record is not None
    assert record.subject == str(path)


def test_store_that_does_not_exist_is_not_made(tmp_path: Path, hashed: list[str]) -> None:
    path = weights(tmp_path)
    assert known_digest(tmp_path / "nothing", path) == digest_of(path)
    assert not (tmp_path / "nothing").exists()


def test_damage_after_the_digest_was_remembered_is_found(store: LocalStore) -> None:
    directory = publish(store, address())
    assert isinstance(store.lookup(address()), Hit)
    assert list((store.root / "verified").iterdir())
    path = directory / "code" / "model.so"
    time.sleep(TICK)
    status = path.stat()
    with open(path, "r+b") as file:
        file.write(b"\xff")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    found = store.lookup(address())
    assert isinstance(found, Corrupt)
    assert "digest differs" in found.reason


def test_always_hashes_every_time_and_remembers_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = LocalStore(tmp_path / "store", verify="always")
    publish(store, address())
    assert isinstance(store.lookup(address()), Hit)
    assert not (store.root / "verified").exists()

"""The local store: complete entries or nothing, whatever happens to the disk."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.entries import address, fill, manifest_of, publish
from tests.support.marks import needs_root
from tests.support.subprocesses import open_to_others
from ts_handlers.errors import StoreError
from ts_handlers.key.cache_key import FORMAT
from ts_handlers.store import entry
from ts_handlers.store.address import safe_name
from ts_handlers.store.base import Corrupt, Hit, Miss
from ts_handlers.store.entry import MANIFEST, Manifest, list_files
from ts_handlers.store.local import store as local
from ts_handlers.store.local import verified
from ts_handlers.store.local.store import LocalStore
from ts_handlers.store.local.trash import move_aside
from ts_handlers.store.local.usage import InUse


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "store")


def trash(store: LocalStore) -> list[Path]:
    return sorted((store.root / "trash").glob("*"))


def test_published_entry_is_a_hit(store: LocalStore) -> None:
    where = address()
    assert store.lookup(where) == Miss(())
    directory = publish(store, where)
    found = store.lookup(where)
    assert isinstance(found, Hit)
    assert found.directory == directory
    assert found.manifest.cache_key == where.key
    assert (directory / "code" / "model.so").stat().st_size == 2048
    assert list((store.root / "staging").iterdir()) == []


def test_address_is_visible_in_the_path(store: LocalStore) -> None:
    where = address("my model/../x")
    directory = publish(store, where)
    relative = directory.relative_to(store.root)
    assert relative.parts == ("entries", "my_model_.._x", ("1f" * 32)[:16], "cpu-x86_64", where.key.digest)


@pytest.mark.parametrize("name", ["..", ".", "", "a/b", "/etc", "é"])
def test_no_model_name_leaves_the_store(name: str, store: LocalStore) -> None:
    directory = publish(store, address(name))
    assert store.root / "entries" in directory.resolve().parents
    assert isinstance(store.lookup(address(name)), Hit)


def test_miss_names_the_parts_that_differ_from_the_nearest_entry(store: LocalStore) -> None:
    publish(store, address(device="other", model="ff" * 32))
    publish(store, address(device="other"))
    publish(store, address(backend="inductor"))
    assert store.lookup(address()) == Miss(("device",))
    assert store.lookup(address("another model")) == Miss(())


def test_nothing_of_a_failed_build_is_left(store: LocalStore) -> None:
    with contextlib.suppress(KeyError), store.staging(address()) as directory:
        fill(directory)
        raise KeyError
    assert list((store.root / "staging").iterdir()) == []
    assert store.lookup(address()) == Miss(())


def _edit(change: Callable[[bytes], bytes], name: str = "code/model.so") -> Callable[[Path], None]:
    def damage(directory: Path) -> None:
        path = directory / name
        path.write_bytes(change(path.read_bytes()))

    return damage


def _flip(data: bytes) -> bytes:
    return data[:100] + bytes([data[100] ^ 1]) + data[101:]


def _link(directory: Path) -> None:
    path = directory / "code" / "model.so"
    shutil.copy(path, directory.parent / "elsewhere.so")
    path.unlink()
    path.symlink_to(directory.parent / "elsewhere.so")


def _of_another_key(directory: Path) -> None:
    where = address(device="other")
    (directory / MANIFEST).unlink()
    entry.write_manifest(directory, manifest_of(where, directory))


def _edit_manifest(**changes: object) -> Callable[[Path], None]:
    def damage(directory: Path) -> None:
        facts = json.loads((directory / MANIFEST).read_text())
        (directory / MANIFEST).write_text(json.dumps({**facts, **changes}))

    return damage


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "flipped bit": (_edit(_flip), "digest differs"),
    "truncated": (_edit(lambda data: data[:1000]), "expected 2048 bytes, found 1000"),
    "zeroed": (_edit(lambda data: bytes(len(data))), "digest differs"),
    "emptied": (_edit(lambda data: b""), "found 0"),
    "extended": (_edit(lambda data: data + b"x"), "found 2049"),
    "deleted": (lambda directory: (directory / "code" / "model.so").unlink(), "missing"),
    "replaced by a link": (_link, "not a plain file"),
    "manifest deleted": (lambda directory: (directory / MANIFEST).unlink(), "no manifest"),
    "manifest truncated": (_edit(lambda data: data[: len(data) // 2], MANIFEST), "manifest.json is damaged"),
    "manifest emptied": (_edit(lambda data: b"", MANIFEST), "manifest.json is damaged"),
    "manifest of no text": (_edit(lambda data: b"\xff" * 50, MANIFEST), "manifest.json is damaged"),
    "manifest edited": (_edit_manifest(artifact={"a": 2}), "changed after it was written"),
    "files unlisted": (_edit_manifest(files={}), "changed after it was written"),
    "another format": (_edit_manifest(format="999"), "format '999'"),
    "unknown field": (_edit_manifest(surprise=1), "manifest.json is damaged"),
    "manifest of another key": (_of_another_key, "key is another one"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_entry_is_never_a_hit_and_moves_aside(case: str, store: LocalStore) -> None:
    damage, reason = DAMAGE[case]
    where = address()
    damage(publish(store, where))
    found = store.lookup(where)
    assert isinstance(found, Corrupt)
    assert reason in found.reason
    assert [reason in (path / "reason.txt").read_text() for path in trash(store)] == [True]
    assert isinstance(store.lookup(where), Miss)
    publish(store, where)
    assert isinstance(store.lookup(where), Hit)


def test_extra_file_is_not_listed_and_does_no_harm(store: LocalStore) -> None:
    directory = publish(store, address())
    (directory / "extra.so").write_bytes(b"x")
    found = store.lookup(address())
    assert isinstance(found, Hit)
    assert "extra.so" not in found.manifest.files


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "code/../../outside"])
def test_manifest_that_lists_files_outside_is_damage(name: str, store: LocalStore) -> None:
    where = address()
    with store.staging(where) as directory:
        fill(directory)
        record = entry.FileRecord(1, "0" * 64)
        manifest = Manifest(FORMAT, where.key.parts, "aot_inductor", {}, {name: record}, {}, {})
        store.publish(where, directory, manifest)
    found = store.lookup(where)
    assert isinstance(found, Corrupt)
    assert "outside the entry" in found.reason


def test_links_and_special_files_are_not_published(store: LocalStore) -> None:
    with store.staging(address()) as directory:
        (directory / "link").symlink_to("/etc/passwd")
        with pytest.raises(ValueError, match="neither a file nor a directory"):
            list_files(directory)
        (directory / "link").unlink()
        os.mkfifo(directory / "pipe")
        with pytest.raises(ValueError, match="neither a file nor a directory"):
            list_files(directory)


def test_second_publisher_of_a_key_uses_the_first_ones_entry(store: LocalStore) -> None:
    first = publish(store, address())
    inode = first.stat().st_ino
    assert publish(store, address()) == first
    assert first.stat().st_ino == inode


def test_publisher_never_uses_a_damaged_entry_that_stands_in_its_way(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    where = address()
    _edit(_flip)(publish(store, where))
    monkeypatch.setattr(LocalStore, "discard", lambda *arguments: None)  # a folder that cannot be moved
    with store.staging(where) as directory:
        fill(directory)
        with pytest.raises(StoreError, match="could not be published"):
            store.publish(where, directory, manifest_of(where, directory))
        assert (directory / "code" / "model.so").exists()


@pytest.mark.parametrize("call", ["fsync", "rename", "mkdir"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EIO])
def test_failed_publish_leaves_the_staged_files_usable(
    call: str, code: int, store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    where = address()
    with store.staging(where) as directory:
        fill(directory)
        manifest = manifest_of(where, directory)
        with monkeypatch.context() as patched:

            def fail(*arguments: object, **options: object) -> None:
                raise OSError(code, os.strerror(code))

            patched.setattr(local.os, call, fail)
            with pytest.raises(StoreError, match="could not be published"):
                store.publish(where, directory, manifest)
        entry.verify_files(directory, manifest)
    assert store.lookup(where) == Miss(())


def test_entry_whose_folder_cannot_be_flushed_is_published(store: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: Path) -> None:
        raise OSError(errno.EINVAL, "no fsync here")

    monkeypatch.setattr(local, "fsync", fail)  # entry.fsync, of the files, works
    directory = publish(store, address())
    assert (directory / MANIFEST).exists()
    assert isinstance(store.lookup(address()), Hit)


def test_every_folder_is_closed_to_others_whatever_the_umask_is(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        store = LocalStore(tmp_path / "deep" / "store")
        directory = publish(store, address())
        store.write_canary(address(), "w", {"cases": []})
        with store.lease(address(), None):
            pass
    finally:
        os.umask(before)
    folders = [path for path in [store.root, *store.root.rglob("*")] if path.is_dir() and directory not in path.parents]
    assert {path.stat().st_mode & 0o077 for path in folders} == {0}


@needs_root
def test_full_disk(small_disk: Path) -> None:
    store = LocalStore(small_disk / "store")
    where = address()
    with store.staging(where) as directory:
        fill(directory)
        manifest = manifest_of(where, directory)
        with open(small_disk / "filler", "wb", buffering=0) as filler:
            assert filler.write(bytes(1 << 20)) < 1 << 20
        with pytest.raises(StoreError, match="No space left"):
            store.publish(where, directory, manifest)
        entry.verify_files(directory, manifest)
        assert store.write_canary(where, "w", {"cases": [torch.zeros(4096)]}) is False
    assert store.lookup(where) == Miss(())
    assert store.read_canary(where, "w") is None
    (small_disk / "filler").unlink()
    publish(store, where)
    assert isinstance(store.lookup(where), Hit)


@needs_root
def test_read_only_store_serves_and_builds_elsewhere(tmp_path: Path, small_disk: Path) -> None:
    store = LocalStore(small_disk / "store")
    publish(store, address())
    store.write_canary(address(), "w", {"cases": []})
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    reader = LocalStore(small_disk / "store")
    assert isinstance(reader.lookup(address()), Hit)
    assert reader.read_canary(address(), "w") == {"cases": []}
    assert reader.write_canary(address(), "v", {"cases": []}) is False
    other = address(device="other")
    with reader.lease(other, None), reader.staging(other) as directory:
        assert small_disk not in directory.parents
        fill(directory)
        with pytest.raises(StoreError, match="could not be published"):
            reader.publish(other, directory, manifest_of(other, directory))
    assert not directory.exists()


@needs_root
def test_damaged_entry_of_a_read_only_store_is_not_used(small_disk: Path) -> None:
    store = LocalStore(small_disk / "store")
    _edit(_flip)(publish(store, address()))
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    assert isinstance(store.lookup(address()), Corrupt)
    with store.staging(address()) as directory:
        fill(directory)
        with pytest.raises(StoreError, match="could not be published"):
            store.publish(address(), directory, manifest_of(address(), directory))


def test_root_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for root in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(StoreError, match=r"cannot be used.*TS_HANDLERS_CACHE"):
            LocalStore(root)


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o702, 0o1777])
def test_root_that_others_can_write_is_refused(mode: int, tmp_path: Path) -> None:
    root = tmp_path / "store"
    root.mkdir()
    root.chmod(mode)
    with pytest.raises(StoreError, match=r"writable by others.*chmod go-w"):
        LocalStore(root)
    root.chmod(0o755)
    LocalStore(root)


@needs_root
def test_root_of_another_user_is_refused(tmp_path: Path) -> None:
    root = tmp_path / "store"
    root.mkdir()
    os.chown(root, 54321, 54321)
    with pytest.raises(StoreError, match=r"belongs to uid 54321.*chown"):
        LocalStore(root)


@needs_root
def test_store_of_root_whose_folders_are_closed_to_this_user_is_a_miss(tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "store")
    publish(store, address())
    store.root.chmod(0o755)
    open_to_others(tmp_path)
    os.seteuid(54321)
    try:
        assert LocalStore(store.root).lookup(address()) == Miss(())
    finally:
        os.seteuid(0)
    assert isinstance(store.lookup(address()), Hit)


def test_staging_of_dead_processes_is_collected_and_of_live_ones_kept(store: LocalStore) -> None:
    base = store.root / "staging"
    (base / "dead" / "sub").mkdir(parents=True)
    (base / "dead" / "sub" / "half-written").write_bytes(b"x")
    (base / "alive").mkdir()
    descriptor = os.open(base / "alive", os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    with store.staging(address()) as first, store.staging(address(device="other")) as second:
        assert first.is_dir()
        assert second.is_dir()
        assert not (base / "dead").exists()
        assert (base / "alive").is_dir()
    os.close(descriptor)


def test_canary_records(store: LocalStore) -> None:
    record = {"cases": [{"inputs": [torch.ones(2)], "outputs": [torch.zeros(1)]}]}
    assert store.read_canary(address(), "w") is None
    assert store.write_canary(address(), "w", record)
    found = store.read_canary(address(), "w")
    assert found is not None
    assert torch.equal(found["cases"][0]["inputs"][0], torch.ones(2))
    assert store.read_canary(address(), "other weights") is None
    assert store.read_canary(address(device="other"), "w") is None


@pytest.mark.parametrize(
    "change",
    [lambda data: data[: len(data) // 2], lambda data: _flip(data), lambda data: b"", lambda data: b"\n" + data],
    ids=["truncated", "flipped", "emptied", "shifted"],
)
def test_damaged_canary_record_is_none_and_replaced(change: Callable[[bytes], bytes], store: LocalStore) -> None:
    store.write_canary(address(), "w", {"cases": []})
    (path,) = (store.root / "canaries").rglob("w")
    path.write_bytes(change(path.read_bytes()))
    assert store.read_canary(address(), "w") is None
    assert store.write_canary(address(), "w", {"cases": []})
    assert store.read_canary(address(), "w") == {"cases": []}


def test_build_estimate_is_the_latest_builds(store: LocalStore) -> None:
    assert store.build_estimate(address()) is None
    publish(store, address(device="other"))
    assert store.build_estimate(address()) == 2.0


def test_entry_published_while_another_looks_stays(store: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader that found no manifest a moment ago must not take what has been published since for a broken entry."""
    other = LocalStore(store.root)

    def acquire(*arguments: object) -> bool:
        patched.undo()
        publish(other, address())
        return False

    with monkeypatch.context() as patched:
        patched.setattr(InUse, "acquire", acquire)
        assert isinstance(store.lookup(address()), Miss)
    assert trash(store) == []
    assert isinstance(store.lookup(address()), Hit)


def test_slow_process_does_not_discard_what_has_replaced_the_entry(store: LocalStore) -> None:
    publish(store, address())
    slow, other = LocalStore(store.root), LocalStore(store.root)
    assert isinstance(slow.lookup(address()), Hit)
    assert isinstance(other.lookup(address()), Hit)
    assert other.discard(address(), "does not load")
    publish(other, address())
    assert not slow.discard(address(), "does not load")
    assert isinstance(LocalStore(store.root).lookup(address()), Hit)
    assert len(trash(store)) == 1


def test_what_was_replaced_just_before_it_is_moved_aside_is_put_back(store: LocalStore) -> None:
    directory = publish(store, address())
    with pytest.raises(FileNotFoundError):
        move_aside(store.root, directory, "a reason", lambda moved: False)
    assert trash(store) == []
    assert isinstance(store.lookup(address()), Hit)
    moved = move_aside(store.root, directory, "a reason", lambda moved: (moved / MANIFEST).exists())
    assert (moved / "reason.txt").read_text() == "a reason\n"


def _nested(path: Path) -> None:
    path.write_bytes(b'{"artifact":{"a":' + b"[" * 50_000 + b"]" * 50_000 + b"}}")


def _folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _link(path: Path) -> None:
    path.unlink()
    path.symlink_to("nowhere")


@pytest.mark.parametrize("change", [_nested, _folder, _link, lambda path: path.write_bytes(b"\xff")])
def test_entry_whose_manifest_cannot_be_read_makes_room_for_a_new_one(
    change: Callable[[Path], None], store: LocalStore
) -> None:
    change(publish(store, address()) / MANIFEST)
    fresh = LocalStore(store.root)
    assert isinstance(fresh.lookup(address(device="other")), Miss)
    assert isinstance(fresh.lookup(address()), Corrupt)
    publish(fresh, address())
    assert isinstance(LocalStore(store.root).lookup(address()), Hit)


def test_canary_record_under_another_name_is_none(store: LocalStore) -> None:
    store.write_canary(address(), "w", {"cases": []})
    store.write_canary(address(), "v", {"cases": []})
    (path,) = (store.root / "canaries").rglob("w")
    shutil.copyfile(path.with_name("v"), path)
    assert store.read_canary(address(), "w") is None
    assert store.read_canary(address(), "v") == {"cases": []}


@pytest.mark.parametrize("times", [1, 2])
def test_a_disk_that_does_not_answer_at_once_costs_no_entry(
    times: int, store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(store, address())
    failed: list[Path] = []
    read = local.read_manifest

    def flaky(directory: Path) -> Manifest:
        if len(failed) < times:
            failed.append(directory)
            raise OSError(errno.EIO, "Input/output error")
        return read(directory)

    monkeypatch.setattr(local, "read_manifest", flaky)
    assert isinstance(store.lookup(address()), Hit)
    assert (len(failed), trash(store)) == (times, [])


@pytest.mark.parametrize("times", [1, 2, 3])
@pytest.mark.parametrize("name", ["listdir", "lstat"])
def test_a_disk_that_does_not_answer_at_once_costs_no_store(
    name: str, times: int, store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise a start goes on with a temporary store, and builds what lies there."""
    publish(store, address())
    call = getattr(os, name)
    failed: list[Any] = []

    def fail(path: Any, **options: Any) -> Any:
        if os.fspath(path) == str(store.root) and len(failed) < times:
            failed.append(path)
            raise OSError(errno.EIO, "does not answer")
        return call(path, **options)

    monkeypatch.setattr(os, name, fail)
    if times == 3:
        with pytest.raises(StoreError, match="cannot be used: does not answer"):
            LocalStore(store.root)
    else:
        assert isinstance(LocalStore(store.root).lookup(address()), Hit)
    assert len(failed) == times


def test_a_disk_that_does_not_answer_at_all_costs_an_entry_only_when_it_is_replaced(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = publish(store, address())

    def fail(*arguments: object) -> Manifest:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(local, "read_manifest", fail)
        found = store.lookup(address())
        assert isinstance(found, Corrupt)
        assert "Input/output error" in found.reason
        assert trash(store) == []
    assert isinstance(store.lookup(address()), Hit)
    store.close()
    with monkeypatch.context() as patch:
        patch.setattr(local, "read_manifest", fail)
        assert isinstance(store.lookup(address()), Corrupt)
        assert publish(store, address()) == directory
    assert len(trash(store)) == 1
    assert isinstance(store.lookup(address()), Hit)


def test_a_byte_that_is_read_wrongly_once_costs_no_entry(store: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(store, address())
    digest, wrong = verified.digest_stream, ["0" * 64]
    monkeypatch.setattr(verified, "digest_stream", lambda file: wrong.pop() if wrong else digest(file))
    assert isinstance(store.lookup(address()), Hit)
    assert trash(store) == []


def test_descriptors_that_foreign_code_closed_are_nobodys(store: LocalStore, tmp_path: Path) -> None:
    """An artifact that closes all descriptors: the store's own numbers may be somebody else's files."""
    publish(store, address())
    assert isinstance(store.lookup(address()), Hit)
    with store.staging(address(options="x")):
        ours = [path.name for path in Path("/proc/self/fd").iterdir() if str(store.root) in os.path.realpath(path)]
        assert len(ours) == 2
        for name in ours:
            os.close(int(name))
        foreign = [os.open(tmp_path / "foreign", os.O_RDONLY | os.O_CREAT) for _ in range(20)]
    store.close()
    for descriptor in foreign:
        os.close(descriptor)


@pytest.mark.parametrize("model", ["m" * 300, "模型" * 150, "m" * 255])
def test_names_that_no_file_can_have_are_shortened(model: str, store: LocalStore) -> None:
    where = address(model=model)
    directory = publish(store, where)
    assert isinstance(store.lookup(where), Hit)
    assert not isinstance(store.lookup(address(model=model + "x")), Hit)
    assert max(len(os.fsencode(part)) for part in directory.parts) <= 255
    for weights in ("w" * 300, "w" * 299 + "x"):
        assert store.write_canary(where, weights, {"weights": weights})
    assert [store.read_canary(where, "w" * 299 + end) for end in "wx"] == [
        {"weights": "w" * 300},
        {"weights": "w" * 299 + "x"},
    ]
    assert store.discard(where, "damaged")


@pytest.mark.parametrize(("name", "stays"), [("m", "m"), ("m" * 255, "m" * 255), ("my model", "my_model"), (".", "_")])
def test_names_that_fit_stay_as_they_are(name: str, stays: str) -> None:
    assert safe_name(name) == stays


def test_a_path_that_is_too_long_is_a_miss(store: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "entry_path", lambda where: "/".join(["long" * 100] * 4))
    assert store.lookup(address()) == Miss(())

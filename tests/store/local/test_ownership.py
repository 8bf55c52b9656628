"""The whole path of the store belongs to this user or root and is closed to others."""

from __future__ import annotations

import os
import pwd
import re
import shutil
from pathlib import Path

import pytest

from tests.store.local.test_store import address, publish
from tests.support.marks import needs_root
from ts_handlers.errors import StoreError
from ts_handlers.store.base import Corrupt, Hit
from ts_handlers.store.local.ownership import check_path
from ts_handlers.store.local.store import LocalStore


@pytest.fixture
def nested(tmp_path: Path) -> Path:
    root = tmp_path / "outer" / "inner" / "store"
    root.mkdir(parents=True, mode=0o700)
    return root


@pytest.mark.parametrize("mode", [0o777, 0o757])
def test_folder_above_that_others_can_write_is_named(mode: int, nested: Path, tmp_path: Path) -> None:
    (tmp_path / "outer").chmod(mode)
    with pytest.raises(
        StoreError, match=rf"{re.escape(str(tmp_path / 'outer'))}, on the way.*chmod go-w.*trust\.folders"
    ):
        LocalStore(nested)
    check_path(nested, [tmp_path / "outer"])
    LocalStore(nested, [f"{tmp_path}/outer/"])
    (tmp_path / "outer").chmod(mode | 0o1000)  # sticky: others cannot replace what is not theirs
    LocalStore(nested)


def test_trusting_the_root_itself_does_not_open_it(nested: Path) -> None:
    nested.chmod(0o777)
    with pytest.raises(StoreError, match="writable by others"):
        check_path(nested, [nested])


@needs_root
def test_folder_above_of_another_user_is_refused(nested: Path, tmp_path: Path) -> None:
    os.chown(tmp_path / "outer", 54321, 54321)
    with pytest.raises(StoreError, match=r"outer, on the way.*belongs to uid 54321"):
        LocalStore(nested)
    LocalStore(nested, [str(tmp_path / "outer")])


@needs_root
def test_group_that_holds_others_too_may_not_write_above(nested: Path, tmp_path: Path) -> None:
    (tmp_path / "outer").chmod(0o775)
    LocalStore(nested)  # root's own group
    os.chown(tmp_path / "outer", 0, 54321)
    with pytest.raises(StoreError, match="writable by others"):
        LocalStore(nested)


def test_every_link_on_the_way_is_followed_and_checked(nested: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("outer/../outer/inner")
    (tmp_path / "second").symlink_to(tmp_path / "link")
    LocalStore(tmp_path / "second" / "store")
    (tmp_path / "outer").chmod(0o777)
    with pytest.raises(StoreError, match="writable by others"):
        LocalStore(tmp_path / "second" / "store")


@needs_root
def test_link_of_another_user_is_refused(nested: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(nested)
    os.chown(tmp_path / "link", 54321, 54321, follow_symlinks=False)
    with pytest.raises(StoreError, match=r"link, on the way.*belongs to uid 54321"):
        LocalStore(tmp_path / "link")


def test_links_in_a_circle_end(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(StoreError):
        LocalStore(tmp_path / "a")
    with pytest.raises(StoreError, match="too many symbolic links"):
        check_path(tmp_path / "a")


def test_no_link_leads_out_of_the_store(tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "store")
    where = address()
    directory = publish(store, where)
    outside = tmp_path / "outside"
    shutil.move(directory.parent, outside)
    directory.parent.symlink_to(outside)
    found = store.lookup(where)
    assert isinstance(found, Corrupt)
    assert "leads out of the store" in found.reason
    assert (outside / directory.name / "manifest.json").exists()
    with pytest.raises(StoreError, match="symbolic link"):
        publish(store, address(options="x"))
    assert [path.name for path in outside.iterdir()] == [directory.name]
    assert isinstance(LocalStore(tmp_path / "other").lookup(where), type(LocalStore(tmp_path / "third").lookup(where)))


def test_folder_of_an_entry_that_is_a_link_is_not_followed(tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "store")
    directory = publish(store, address())
    assert isinstance(store.lookup(address()), Hit)
    shutil.move(directory / "code", tmp_path / "code")
    (directory / "code").symlink_to(tmp_path / "code")
    found = store.lookup(address())
    assert isinstance(found, Corrupt)
    assert "symbolic link" in found.reason


@pytest.mark.parametrize("above", ["entries", "entries/m", "entry", "code", "file", "manifest"])
def test_whatever_others_can_write_inside_an_open_store_is_no_hit(above: str, tmp_path: Path) -> None:
    """A root of 0755, which others may enter: each folder and file below it is looked at, at each lookup."""
    store = LocalStore(tmp_path / "store")
    directory = publish(store, address())
    for folder in (store.root, *reversed(directory.relative_to(store.root).parents), Path("entries")):
        (store.root / folder).chmod(0o755)
    for folder in (directory, directory / "code"):
        folder.chmod(0o755)
    assert isinstance(store.lookup(address()), Hit)
    path = {
        "entries": store.root / "entries",
        "entries/m": store.root / "entries" / "m",
        "entry": directory,
        "code": directory / "code",
        "file": directory / "code" / "model.so",
        "manifest": directory / "manifest.json",
    }[above]
    path.chmod(path.stat().st_mode & 0o777 | 0o022)
    found = store.lookup(address())
    assert isinstance(found, Corrupt)
    assert re.search(rf"{re.escape(str(path))} is writable by others \(mode 0...\).*chmod go-w", found.reason)
    if above.startswith("entries"):  # moving the entry would mend nothing, and nothing is published below it
        assert directory.exists()
        with pytest.raises(StoreError, match="writable by others"):
            publish(store, address(options="x"))
    else:
        publish(store, address())
        assert isinstance(store.lookup(address()), Hit)


@needs_root
@pytest.mark.parametrize("name", ["", "code", "code/model.so", "manifest.json"])
def test_nothing_of_another_user_inside_the_store_is_a_hit(name: str, tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "store")
    directory = publish(store, address())
    os.chown(directory / name, 54321, 54321)
    found = store.lookup(address())
    assert isinstance(found, Corrupt)
    assert "belongs to uid 54321" in found.reason
    publish(store, address())
    assert isinstance(store.lookup(address()), Hit)


def test_modes_below_a_folder_that_others_cannot_enter_do_not_matter(tmp_path: Path) -> None:
    """Entries of a process whose umask was 002 or 0 stay hits; new ones are closed when they are published."""
    store = LocalStore(tmp_path / "store")
    directory = publish(store, address())
    (directory / "code").chmod(0o777)
    (directory / "code" / "model.so").chmod(0o666)
    assert isinstance(store.lookup(address()), Hit)
    before = os.umask(0)
    try:
        directory = publish(store, address(options="x"))
    finally:
        os.umask(before)
    assert [oct(path.stat().st_mode & 0o022) for path in directory.rglob("*")] == ["0o0"] * 4


def test_the_way_to_the_store_is_checked_at_each_lookup(nested: Path, tmp_path: Path) -> None:
    store = LocalStore(nested)
    publish(store, address())
    (tmp_path / "outer").chmod(0o777)
    found = store.lookup(address())
    assert isinstance(found, Corrupt)
    assert "on the way to the store" in found.reason
    (tmp_path / "outer").chmod(0o700)
    assert isinstance(store.lookup(address()), Hit)


def test_canary_records_that_others_can_write_are_recorded_again(tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "store")
    assert store.write_canary(address(), "w", {"cases": 1})
    for folder in ("", "canaries", f"canaries/{address().key.digest}"):
        (store.root / folder).chmod(0o755)
    assert store.read_canary(address(), "w") == {"cases": 1}
    (store.root / "canaries" / address().key.digest).chmod(0o777)
    assert store.read_canary(address(), "w") is None
    assert store.canaries(address()) == []


@needs_root
def test_a_group_that_is_the_primary_one_of_others_is_not_private(
    nested: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "outer").chmod(0o775)
    LocalStore(nested)
    everybody = [*pwd.getpwall(), pwd.struct_passwd(("guest", "x", 54321, os.getegid(), "", "/", "/bin/sh"))]
    monkeypatch.setattr(pwd, "getpwall", lambda: everybody)
    with pytest.raises(StoreError, match="writable by others"):
        LocalStore(nested)

"""`gc`, `pin`, `unpin` and `verify`."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.entries import address, publish
from ts_handlers.cli.exit_codes import ExitCode
from ts_handlers.store.local.store import LocalStore

Run = Callable[..., Any]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A store with three entries of one model that nobody uses; the first is the oldest."""
    store = LocalStore(tmp_path / "store")
    for index in range(3):
        directory = publish(store, address(device=str(index)))
        os.utime(directory, (1000 + index, 1000 + index))
    store.write_canary(address(device="0"), "w", {"cases": []})
    store.close()
    return store.root


def key(index: int) -> str:
    return address(device=str(index)).key.digest


def keys(run: Run, root: Path) -> list[str]:
    return sorted(entry["key"] for entry in run("ls", "--store", root, "--json").json["entries"])


def test_gc_without_a_quota_removes_only_garbage(run: Run, root: Path) -> None:
    (root / "trash" / "evicted-x").mkdir(parents=True)
    said = run("gc", "--store", root, "--dry-run", "--json")
    assert [Path(step["path"]).name for step in said.json["steps"]] == ["evicted-x"]
    assert (root / "trash" / "evicted-x").exists()
    assert run("gc", "--store", root).code == 0
    assert not (root / "trash" / "evicted-x").exists()
    assert len(keys(run, root)) == 3


def test_gc_with_a_quota_evicts_the_oldest_but_not_the_pinned(run: Run, root: Path) -> None:
    assert run("pin", key(0), "--note", "production", "--store", root).code == 0
    dry = run("gc", "--max-entries", "2", "--dry-run", "--store", root)
    assert (dry.code, len(keys(run, root))) == (0, 3)
    assert "would be freed" in dry.out
    done = run("gc", "--max-entries", "2", "--store", root, "--json")
    assert [step["key"] for step in done.json["steps"]] == [key(1)]
    assert done.json["freed_bytes"] > 2048
    assert keys(run, root) == sorted([key(0), key(2)])
    unmet = run("gc", "--model-max-bytes", "1KiB", "--store", root)
    assert unmet.code == ExitCode.FINDINGS
    assert "pinned or in use" in unmet.out
    assert keys(run, root) == [key(0)]
    assert "its note was: production" in run("unpin", key(0)[:8], "--store", root).out
    assert run("gc", "--max-inodes", "0", "--store", root).code == 0
    assert keys(run, root) == []


def test_gc_refuses_a_size_that_is_none(run: Run, root: Path) -> None:
    result = run("gc", "--max-bytes", "20 apples", "--store", root)
    assert result.code == ExitCode.USAGE
    assert "20GiB" in result.err


def test_unpin_of_a_key_that_is_not_pinned_is_a_usage_error(run: Run, root: Path) -> None:
    assert run("unpin", key(0), "--store", root).code == ExitCode.USAGE
    assert run("pin", "nothing", "--store", root).code == ExitCode.USAGE


def test_verify_finds_nothing_in_a_sound_store(run: Run, root: Path) -> None:
    result = run("verify", "--store", root, "--json")
    assert (result.code, result.json["checked"], result.json["damaged"]) == (0, 4, [])


def test_verify_finds_damage_and_repairs_only_when_asked(run: Run, root: Path) -> None:
    (library,) = (root / "entries").glob(f"*/*/*/{key(1)}/code/model.so")
    library.write_bytes(bytes(2048))
    (canary,) = (root / "canaries").rglob("w")
    canary.write_bytes(b"broken")
    found = run("verify", "--store", root, "--json")
    assert found.code == ExitCode.FINDINGS
    assert [(item["kind"], item["key"], item["action"]) for item in found.json["damaged"]] == [
        ("entry", key(1), None),
        ("canary", key(0), None),
    ]
    assert library.exists()
    repaired = run("verify", "--repair", "--store", root)
    assert repaired.code == ExitCode.FINDINGS
    assert repaired.out.count("moved aside") == 2
    assert keys(run, root) == sorted([key(0), key(2)])
    assert run("verify", "--store", root).code == 0
    aside = run("ls", "--store", root, "--json").json["moved_aside"]
    assert sorted(item["name"][:32] for item in aside) == sorted([key(0), key(1)])
    assert all("digest" in item["reason"] for item in aside)


def test_verify_hashes_what_lookups_believe_unchanged(run: Run, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit rot: the content differs and nothing of the file's status does."""
    from ts_handlers.store.local import verified

    stamps: dict[str, tuple[int, ...]] = {}
    monkeypatch.setattr(verified, "RACY_SECONDS", 0.0)
    monkeypatch.setattr(verified, "_stamp", lambda status: stamps.setdefault(str(status.st_ino), (1, 2, 3, 4, 5)))
    store = LocalStore(root)
    where = address(device="1")
    store.lookup(where)
    (library,) = (root / "entries").glob(f"*/*/*/{key(1)}/code/model.so")
    library.write_bytes(bytes(2048))
    assert type(store.lookup(where)).__name__ == "Hit"
    assert run("verify", "--store", root).code == ExitCode.FINDINGS
    store.close()


def test_repair_leaves_an_entry_that_a_process_reads(run: Run, root: Path) -> None:
    reader = LocalStore(root)
    assert type(reader.lookup(address(device="1"))).__name__ == "Hit"
    (library,) = (root / "entries").glob(f"*/*/*/{key(1)}/code/model.so")
    library.write_bytes(bytes(2048))
    (item,) = run("verify", "--repair", "--store", root, "--json").json["damaged"]
    assert item["action"] == "in use"
    assert library.exists()
    reader.close()
    (item,) = run("verify", "--repair", "--store", root, "--json").json["damaged"]
    assert item["action"] == "moved aside"

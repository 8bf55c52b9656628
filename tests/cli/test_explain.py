"""`explain`: which part of two keys differs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from entries import address, publish

from ts_handlers.cli.exit_codes import ExitCode
from ts_handlers.store.local import LocalStore

Run = Callable[..., Any]


def test_explain_names_the_part_and_the_words_that_differ(run: Run, tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "store")
    keys = []
    for device in ("x86_64 avx avx2", "x86_64 avx"):
        publish(store, address(device=device))
        keys.append(address(device=device).key.digest)
    result = run("explain", *keys, "--store", store.root, "--json")
    assert result.code == ExitCode.FINDINGS
    assert result.json[0]["differs"] == [{"part": "device", "left": "x86_64 avx avx2", "right": "x86_64 avx"}]
    table = run("explain", keys[0][:10], keys[1][:10], "--store", store.root)
    assert "avx2" in table.out
    assert "x86_64" not in table.out
    same = run("explain", keys[0], keys[0], "--store", store.root)
    assert same.code == 0
    assert "the same key" in same.out


def test_explain_of_a_damaged_entry_says_so(run: Run, tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "store")
    (publish(store, address()) / "manifest.json").write_text("{")
    key = address().key.digest
    result = run("explain", key, key, "--store", store.root)
    assert result.code == ExitCode.USAGE
    assert "damaged" in result.err

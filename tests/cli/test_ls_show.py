"""`ls` and `show` on a store that real starts have filled."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ts_handlers.cli.exit_codes import ExitCode

Run = Callable[..., Any]


def test_ls_lists_an_entry_with_its_facts(run: Run, filled: Path) -> None:
    listed = run("ls", "--store", filled, "--json")
    assert listed.code == 0
    (entry,) = listed.json["entries"]
    assert (entry["model"], entry["backend"], entry["state"]) == ("linear", "aot_inductor", "ok")
    assert (entry["pinned"], entry["problem"]) == (False, None)
    files = [path for path in (filled / "entries").rglob("*") if path.is_file()]
    canaries = [path for path in (filled / "canaries").rglob("*") if path.is_file()]
    assert entry["bytes"] == sum(path.stat().st_size for path in files + canaries)
    assert listed.json["total"] == {"entries": 1, "bytes": entry["bytes"], "inodes": entry["inodes"]}
    table = run("ls", "--store", filled)
    assert table.code == 0
    assert entry["key"][:12] in table.out
    assert run("ls", "other*", "--store", filled, "--json").json["entries"] == []


def test_ls_shows_damage_and_ends_with_a_finding(run: Run, filled: Path) -> None:
    (manifest,) = (filled / "entries").rglob("manifest.json")
    manifest.write_text("{half")
    listed = run("ls", "--store", filled, "--json")
    assert listed.code == ExitCode.FINDINGS
    assert listed.json["entries"][0]["state"] == "damaged"
    assert "manifest.json is damaged" in run("ls", "--store", filled).out
    assert manifest.exists()


def test_show_by_the_first_digits_of_the_key(run: Run, filled: Path) -> None:
    key = run("ls", "--store", filled, "--json").json["entries"][0]["key"]
    (facts,) = run("show", key[:6], "--store", filled, "--json").json
    assert facts["key"] == key
    assert facts["parts"]["backend"] == "aot_inductor"
    assert set(facts["files"]) == {"part/first.json", "second.json"}
    assert len(facts["canaries"]) == 1
    shown = run("show", key, "--store", filled)
    assert shown.code == 0
    assert "toolchain" in shown.out
    assert facts["files"]["second.json"]["sha256"][:16] in shown.out


def test_key_that_does_not_exist_is_a_usage_error(run: Run, filled: Path) -> None:
    result = run("show", "zzz", "--store", filled)
    assert result.code == ExitCode.USAGE
    assert "no key in" in result.err

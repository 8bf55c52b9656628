"""`ls` and `unquarantine` of what a crash left, and `doctor`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import ts_handlers.doctor
from tests.support.subprocesses import run_python
from ts_handlers.cli.exit_codes import ExitCode
from ts_handlers.guard.failures import remember_failure
from ts_handlers.guard.guard import Guard
from ts_handlers.key.cache_key import CacheKey
from ts_handlers.settings import Settings
from ts_handlers.store.entry import read_manifest

Run = Callable[..., Any]


def quarantine(store: Path) -> tuple[str, str]:
    """Quarantine the entry of ``linear``, and a build; returns both keys."""
    (manifest,) = (store / "entries").rglob("manifest.json")
    entry = read_manifest(manifest.parent)
    other = CacheKey((("backend", "inductor"),))
    for key, digest, model in ((entry.cache_key, entry.digest, "linear"), (other, "", "other")):
        Guard(store, Settings(), key, model, lambda: "w1").quarantine_canary(digest, ValueError("it is off"))
    return entry.cache_key.digest, other.digest


def test_ls_shows_what_is_quarantined_and_unquarantine_lifts_it(run: Run, filled: Path) -> None:
    key, other = quarantine(filled)
    listed = run("ls", "--store", filled, "--json")
    assert listed.code == ExitCode.FINDINGS
    assert {(record["key"], record["model"], record["reason"]) for record in listed.json["quarantined"]} == {
        (key, "linear", "ValueError: it is off"),
        (other, "other", "ValueError: it is off"),
    }
    table = run("ls", "--store", filled).out
    assert " quarantined" in next(line for line in table.splitlines() if line.startswith("linear"))
    assert table.count("ValueError: it is off") == 2
    assert other[:12] not in run("ls", "linear", "--store", filled).out
    lifted = run("unquarantine", key[:6], "--store", filled, "--json")
    assert [record["key"] for record in lifted.json] == [key]
    assert other in run("unquarantine", other, "--store", filled).out
    assert run("ls", "--store", filled).code == 0
    again = run("unquarantine", key, "--store", filled)
    assert (again.code, "no quarantined key" in again.err) == (ExitCode.USAGE, True)


@pytest.mark.processes
def test_failed_builds_are_listed_shown_and_lifted(run: Run, filled: Path) -> None:
    key = "ab" * 16
    for _ in range(2):
        remember_failure(filled, key, "linear", "inductor", "BuildError: no way", "deterministic", 1.0)
    listed = run("ls", "--store", filled, "--json")
    assert listed.code == ExitCode.FINDINGS
    (record,) = listed.json["quarantined"]
    assert (record["key"], record["kind"], record["count"], record["held_seconds"]) == (key, "deterministic", 2, 7200.0)
    assert " min  " in next(line for line in run("ls", "--store", filled).out.splitlines() if key[:12] in line)
    shown = run("show", key[:4], "--store", filled)
    assert (shown.code, "BuildError: no way" in shown.out) == (ExitCode.FINDINGS, True)
    assert run("show", key, "--store", filled, "--json").json == [
        {"key": key, "state": "no entry", "quarantined": [record]}
    ]
    assert "tried again in" in run("doctor", "--store", filled).out
    assert "BuildError: no way" in run("unquarantine", key, "--store", filled).out
    assert run("ls", "--store", filled).code == 0


def test_several_keys_are_not_lifted_at_once(run: Run, filled: Path) -> None:
    for key in ("ab" * 16, "ac" * 16):
        remember_failure(filled, key, "linear", "inductor", "BuildError: no way", "deterministic", 1.0)
    result = run("unquarantine", "a", "--store", filled)
    assert (result.code, "2 quarantined keys" in result.err) == (ExitCode.USAGE, True)
    assert len(run("ls", "--store", filled, "--json").json["quarantined"]) == 2


def test_quarantines_are_read_without_torch(filled: Path) -> None:
    quarantine(filled)
    code = """
        import sys
        from ts_handlers.guard.quarantine import read_quarantines
        print(len(read_quarantines(sys.argv[1])), "torch" in sys.modules)
    """
    assert run_python(code, filled, fresh=True).split() == ["2", "False"]


def test_doctor_prints_findings_and_ends_by_the_worst(run: Run, filled: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("ts_handlers.doctor.CHECKS", ts_handlers.doctor.CHECKS[8:])
    assert (run("doctor", "--store", filled).code, run("doctor", "--store", filled, "--json").json["status"]) == (
        0,
        "ok",
    )
    quarantine(filled)
    found = run("doctor", "--store", filled)
    assert found.code == ExitCode.FINDINGS
    assert "ts-handlers unquarantine" in found.out
    config = tmp_path / "model-config.yaml"
    config.write_text("startupTimeout: 0.00001")
    failed = run("doctor", "--store", filled, "--config", config, "--model", "linear", "--json")
    assert (failed.code, failed.json["status"]) == (ExitCode.FAILED, "fail")
    assert "building linear took" in failed.json["findings"][-1]["found"]


def test_an_empty_key_lifts_nothing(run: Run, filled: Path) -> None:
    """Also where there is one key alone, which it would name."""
    remember_failure(filled, "ab" * 16, "linear", "inductor", "BuildError: no way", "deterministic", 1.0)
    refused = run("unquarantine", "", "--store", filled)
    assert (refused.code, "found nothing" in refused.err) == (ExitCode.USAGE, True)
    assert len(list((filled / "quarantine").iterdir())) == 1


def test_no_control_character_reaches_a_terminal(run: Run, filled: Path) -> None:
    """A model's name and a reason are anybody's text: here they set the window's title and clear the screen."""
    evil = "\x1b]0;title\x07\x1b[2J\x9b2J\u202e"
    key = "ab" * 16
    assert remember_failure(filled, key, f"model{evil}", "inductor", f"reason{evil}\r\nok", "deterministic", 1.0)
    for arguments in (
        ("ls", "--store", filled),
        ("show", key, "--store", filled),
        ("pin", evil, "--store", filled),
        ("push", f"file:///nowhere{evil}", "--store", filled),
        ("unquarantine", key, "--store", filled),
    ):
        result = run(*arguments)
        shown = result.out + result.err
        assert [repr(char) for char in shown if not char.isprintable() and char not in "\n\t"] == [], arguments
        if arguments[0] in ("ls", "show", "unquarantine"):
            assert "title" in shown

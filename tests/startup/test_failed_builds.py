"""Builds that failed are remembered, tried again when that makes sense, and say why they are not."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.support.starts import (
    Start,
    check,
    count_calls,
    counters,
    fail_builds,
)
from ts_handlers.errors import (
    BuildError,
    LoadError,
)
from ts_handlers.guard.quarantine import lift_quarantine, read_quarantines
from ts_handlers.store.upkeep.space import wait_for_room

pytestmark = pytest.mark.usefixtures("backend")


def test_a_failed_build_is_not_tried_by_the_next_start_and_says_why(
    start: Start, archive: Path, backend: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with monkeypatch.context() as patched:
        fail_builds(backend, patched, BuildError("aten::nonsense cannot be exported"))
        assert counters(check(start(), archive)) == {"miss": 1, "build_failed": 1, "fallback": 1}
    calls = count_calls(backend, monkeypatch)
    facts = check(start(), archive)
    assert calls == []
    assert counters(facts) == {"miss": 1, "build_skipped": 1, "fallback": 1}
    (record,) = read_quarantines(tmp_path / "store")
    assert (record.kind, record.phase, record.count) == ("deterministic", "build", 1)
    reason = facts["fallbacks"][0]["reason"]
    for part in (
        "a build failed 0 s ago",
        "aten::nonsense",
        f"unquarantine {record.key[:12]}",
        "tried again in 60 min",
    ):
        assert part in reason
    # Another key is another build; strict, and whoever asks for it, try again; success removes the record.
    assert start(dimensions={"batch": {"min": 1, "max": 9}}).outcome.result == "built"
    assert start(strict=True).outcome.result == "built"
    assert read_quarantines(tmp_path / "store") == []
    assert start().outcome.result == "hit"


def test_a_lifted_failure_is_tried_again(
    start: Start, backend: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with monkeypatch.context() as patched:
        fail_builds(backend, patched, BuildError("no"))
        start()
    (record,) = lift_quarantine(tmp_path / "store", "")
    assert record.reason == "BuildError: no"
    assert start().outcome.result == "built"


def test_strict_tries_what_failed_and_raises_its_own_error(
    start: Start, backend: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for number in (1, 2):
        fail_builds(backend, monkeypatch, BuildError(f"attempt {number}"))
        with pytest.raises(BuildError, match=f"attempt {number}"):
            start(strict=True)
    (record,) = read_quarantines(tmp_path / "store")
    assert (record.reason, record.count) == ("BuildError: attempt 2", 2)


def test_what_was_built_but_does_not_load_is_not_built_again(
    start: Start, archive: Path, backend: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any) -> Any:
        raise LoadError("undefined symbol")

    monkeypatch.setattr(backend, "load", fail)
    assert counters(check(start(), archive)) == {"miss": 1, "build": 1, "build_failed": 1, "fallback": 1}
    assert counters(check(start(), archive)) == {"miss": 1, "build_skipped": 1, "fallback": 1}


def test_another_compiler_is_another_chance(start: Start, backend: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        fail_builds(backend, patched, RuntimeError("no C++ compiler"))
        start()
    assert start().metrics.counters["build_skipped"] == 1
    monkeypatch.setattr("ts_handlers.guard.failures.compiler_identity", lambda: "g++ 99")
    assert start().outcome.result == "built"


def test_a_hit_reads_no_record_of_a_build(start: Start, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    key = start().outcome.key
    wait_for_room()  # the garbage collection of a start that has built reads everything
    (tmp_path / "store" / "quarantine").mkdir(exist_ok=True)
    (tmp_path / "store" / "quarantine" / f"{key}-build-0123456789ab.json").write_text("damaged")
    assert start().outcome.result == "hit"
    assert "cannot be read" not in caplog.text
    shutil.rmtree(tmp_path / "store" / "entries")
    assert start().outcome.result == "built"
    assert "cannot be read" in caplog.text

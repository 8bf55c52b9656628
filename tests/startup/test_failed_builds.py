"""Builds that failed are remembered, tried again when that makes sense, and say why they are not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Register
from tests.support.file_backend import FileBackend
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
from ts_handlers.guard.records import FailedBuild
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


@pytest.mark.parametrize(
    "fix",
    [
        {"inputs": [{"name": "x", "dtype": "float32", "shape": ["batch", 4], "values": [0, 1]}]},
        {"inputs": [{"name": "x", "dtype": "float32", "shape": ["batch", 4], "limits": [-9, 9]}]},
        {"warmup": [{"batch": 3}]},
        {"canary": {"tolerance": 0.1}},
        {"canary": {"seed": 5}},
        {"guard": {"load_memory_mb": 4000}},
    ],
)
def test_what_a_user_changes_after_a_failure_is_tried_at_once(
    fix: dict[str, Any], start: Start, backend: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """None of these is in the key."""
    with monkeypatch.context() as patched:
        fail_builds(backend, patched, BuildError("wrong at these values"))
        assert start().metrics.counters["build_failed"] == 1
    assert start(on_miss="compile", verify="always").metrics.counters["build_skipped"] == 1
    assert start(**fix).outcome.result == "built"
    assert read_quarantines(tmp_path / "store") == []


def test_a_variable_that_builds_depend_on_is_another_chance(
    start: Start, backend: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        fail_builds(backend, patched, BuildError("no"))
        start()
    assert start().metrics.counters["build_skipped"] == 1
    monkeypatch.setenv("CUDA_HOME", "/opt/another")
    assert start().outcome.result == "built"


def test_a_record_of_an_older_version_still_holds(
    start: Start, backend: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with monkeypatch.context() as patched:
        fail_builds(backend, patched, BuildError("no"))
        start()
    (path,) = (tmp_path / "store" / "quarantine").iterdir()
    fields = json.loads(path.read_text())
    assert fields.pop("depends")
    path.write_text(json.dumps(fields))
    assert start(warmup=[{"batch": 3}]).metrics.counters["build_skipped"] == 1


@pytest.mark.parametrize(
    ("error", "times", "served"),
    [
        (BuildError("aten::nonsense cannot be exported"), 1, "other"),
        (OSError(5, "Input/output error"), 1, "aot_inductor"),
        (OSError(5, "Input/output error"), 2, "other"),
    ],
)
def test_an_entry_of_a_lower_backend_is_served_before_a_hopeless_build_is_repeated(
    error: Exception,
    times: int,
    served: str,
    start: Start,
    archive: Path,
    backend: Any,
    register: Register,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    other = FileBackend()
    monkeypatch.setattr(other, "name", "other", raising=False)
    register("other", other)
    order = {"backends": ["aot_inductor", "other", "eager"]}
    with monkeypatch.context() as patched:
        fail_builds(backend, patched, error)
        for _ in range(times):
            assert start(**order).outcome.backend == "other"
            age_records(patched)
    age_records(monkeypatch)
    calls = count_calls(backend, monkeypatch)
    model = start(**order)
    assert model.outcome.backend == served
    assert ("build" in calls) == (served != "other")
    if served == "other":
        assert model.outcome.result == "hit"
        assert counters(check(model, archive)) == {"miss": 1, "hit": 1, "build_skipped": 1, "fallback": 1}
        reason = model.outcome.fallbacks[0]["reason"]
        assert "the entry of other is there" in reason
        assert "prewarm" in reason
        # Whoever asks for it gets it, and without an entry it is built as before.
        shutil.rmtree(Path(str(model.store.root)) / "entries")  # type: ignore[union-attr]
        assert start(**order).outcome.backend == "aot_inductor"


def age_records(monkeypatch: pytest.MonkeyPatch) -> None:
    """The time to try again has come."""
    monkeypatch.setattr(FailedBuild, "is_over", property(lambda record: True))

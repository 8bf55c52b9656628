"""Many processes on one store: one builds, any may die at any moment, nobody sees half an entry."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.file_backend import PHASES, START
from tests.support.models import eager_model
from tests.support.subprocesses import finish, run_python, start_python
from ts_handlers.guard.quarantine import lift_quarantine, read_quarantines

pytestmark = pytest.mark.processes


def published(store: Path) -> list[Path]:
    return sorted((store / "entries").rglob("manifest.json"))


def begun(log: Path) -> int:
    return log.read_text().count("begin") if log.exists() else 0


def check(out: str, archive: Path) -> dict[str, Any]:
    """Parse what a process printed; its answer must be the eager model's."""
    facts: dict[str, Any] = json.loads(out.splitlines()[-1])
    with torch.inference_mode():
        expected = eager_model(archive)(torch.ones(2, 4))
    assert torch.allclose(torch.tensor(facts["answer"]), expected, atol=1e-5)
    return facts


def first_line(child: Any, *texts: str) -> str:
    """The first line of a child's log that holds one of the texts."""
    line: str = next(line for line in iter(child.stderr.readline, "") if any(text in line for text in texts))
    return line


def test_eight_processes_build_once(archive: Path, tmp_path: Path) -> None:
    store, log = tmp_path / "store", tmp_path / "builds"
    go = tmp_path / "go"
    children = [start_python(START, archive, store, BUILD_LOG=str(log), BUILD_UNTIL=str(go)) for _ in range(8)]
    waiting = [
        "another process builds" in first_line(child, "another process builds", "building") for child in children
    ]
    go.touch()
    results = [check(finish(child), archive) for child in children]
    assert sum(waiting) == 7
    assert begun(log) == 1
    assert len(published(store)) == 1
    assert sum(facts["counters"]["build"] for facts in results) == 1
    assert sum(facts["counters"]["hit"] for facts in results) == 7
    assert sorted(facts["result"] for facts in results) == ["built"] + ["waited"] * 7
    assert sum(facts["canary"]["source"] == "eager" for facts in results) >= 1


@pytest.mark.parametrize("phase", PHASES)
def test_builder_killed_at_any_moment_leaves_nothing_partial(phase: str, archive: Path, tmp_path: Path) -> None:
    store, log = tmp_path / "store", tmp_path / "builds"
    killed = start_python(START, archive, store, BUILD_LOG=str(log), KILL_AT=phase)
    finish(killed, -signal.SIGKILL)
    complete = phase == "after rename"
    assert len(published(store)) == int(complete)
    facts = check(run_python(START, archive, store, BUILD_LOG=str(log)), archive)
    assert facts["result"] == ("hit" if complete else "built")
    assert facts["fallbacks"] == []
    assert facts["counters"]["corrupt"] == 0
    assert begun(log) == {"before staging": 1, "after rename": 1}.get(phase, 2)
    assert len(published(store)) == 1
    assert list((store / "staging").iterdir()) == []


def test_waiter_takes_over_from_a_killed_builder(archive: Path, tmp_path: Path) -> None:
    store, log = tmp_path / "store", tmp_path / "builds"
    holder = start_python(START, archive, store, BUILD_LOG=str(log), BUILD_SECONDS="600")
    while begun(log) == 0:
        assert holder.poll() is None
    waiter = start_python(START, archive, store, BUILD_LOG=str(log))
    said = first_line(waiter, "another process builds")
    assert f"pid {holder.pid}" in said
    assert "phase build" in said
    assert waiter.poll() is None
    holder.kill()
    assert check(finish(waiter), archive)["result"] == "built"
    holder.communicate()
    assert begun(log) == 2
    assert len(published(store)) == 1


def test_process_without_a_usable_store_serves_and_says_so(archive: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    facts = check(run_python(START, archive, tmp_path / "file"), archive)
    assert facts["result"] == "built"
    assert [fallback["backend"] for fallback in facts["fallbacks"]] == ["store"]


def test_workers_that_an_artifact_kills_together_restart_on_the_next_backend(archive: Path, tmp_path: Path) -> None:
    store, log = tmp_path / "store", tmp_path / "builds"
    run_python(START, archive, store, BUILD_LOG=str(log))
    crash = {"BUILD_LOG": str(log), "CRASH_AT": "load", "CRASHES": "2"}
    for child in [start_python(START, archive, store, **crash) for _ in range(2)]:
        finish(child, -signal.SIGSEGV)
    for child in [start_python(START, archive, store, **crash) for _ in range(2)]:
        facts = check(finish(child), archive)
        assert (facts["backend"], facts["counters"]["quarantined"]) == ("eager", 1)
        assert "Segmentation fault while loading" in facts["fallbacks"][0]["reason"]
    assert log.read_text().count("crash") == 2
    (record,) = read_quarantines(store)
    assert "file_backend.py" in record.details
    lift_quarantine(store, record.key)
    assert check(run_python(START, archive, store, BUILD_LOG=str(log)), archive)["result"] == "hit"


def test_a_build_that_kills_its_process_is_not_repeated(archive: Path, tmp_path: Path) -> None:
    store, log = tmp_path / "store", tmp_path / "builds"
    crash = {"BUILD_LOG": str(log), "CRASH_AT": "build"}
    finish(start_python(START, archive, store, **crash), -signal.SIGSEGV)
    facts = check(run_python(START, archive, store, **crash), archive)
    assert facts["backend"] == "eager"
    assert "Segmentation fault while building" in facts["fallbacks"][0]["reason"]
    assert begun(log) == 1


def test_four_workers_try_a_build_that_fails_once(archive: Path, tmp_path: Path) -> None:
    store, log = tmp_path / "store", tmp_path / "builds"
    failing = {"BUILD_LOG": str(log), "BUILD_ERROR": "an operator that cannot be exported"}
    children = [start_python(START, archive, store, **failing) for _ in range(4)]
    facts = [check(finish(child), archive) for child in children]
    assert begun(log) == 1
    assert sorted(each["counters"]["build_failed"] for each in facts) == [0, 0, 0, 1]
    assert sorted(each["counters"]["build_skipped"] for each in facts) == [0, 1, 1, 1]
    for each in facts:
        (fallback,) = each["fallbacks"]
        assert (each["backend"], fallback["backend"]) == ("eager", "aot_inductor")
        assert "BuildError: an operator that cannot be exported" in fallback["reason"]

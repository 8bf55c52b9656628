"""Background builds that fail, are killed or cannot begin: the model stays eager and says why."""

from __future__ import annotations

import dataclasses
import os
import signal
import socket
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support import file_backend
from tests.support.background_builds import (
    ROWS,
    Start,
    background,
    begun,
    building,
    counters,
    settled,
    stays_eager,
)
from tests.support.marks import needs_root
from tests.support.models import settings_of
from ts_handlers import ModuleSource, start_model
from ts_handlers.guard.quarantine import read_quarantines

pytestmark = [pytest.mark.processes, pytest.mark.usefixtures("cheap_backends")]


def test_child_is_nice_and_a_killed_one_changes_nothing(
    start: Start, archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BUILD_UNTIL", str(tmp_path / "never"))
    model = start(background={"nice": 7})
    facts = building(model)
    assert facts["state"] == "building"
    assert begun(tmp_path) == [facts["pid"]]
    assert os.getpriority(os.PRIO_PROCESS, facts["pid"]) == min(19, os.getpriority(os.PRIO_PROCESS, 0) + 7)
    assert os.getpgid(facts["pid"]) != os.getpgid(0)
    assert os.getsid(facts["pid"]) == os.getsid(0)
    os.kill(facts["pid"], signal.SIGKILL)
    after = settled(model, archive)
    stays_eager(after, "was killed by SIGKILL")
    assert counters(after) == {"miss": 1, "background_build": 1, "background_failed": 1}
    assert list((tmp_path / "store").rglob("manifest.json")) == []
    monkeypatch.delenv("BUILD_UNTIL")
    at_once = start(background={"nice": 7})  # with other limits it would be tried again
    assert (at_once.background, at_once.metrics.counters["build_skipped"]) == (None, 1)
    (record,) = read_quarantines(tmp_path / "store")
    assert (record.kind, "was killed by SIGKILL" in record.reason) == ("circumstantial", True)
    assert settled(start(retry_failed=True, background={"nice": 7}), archive)["backend"] == "aot_inductor"


def test_child_holds_neither_the_servers_sockets_nor_its_output(
    start: Start, archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where somebody has made them inheritable."""
    monkeypatch.setenv("BUILD_UNTIL", str(tmp_path / "go"))
    with socket.socket() as listener, (tmp_path / "output").open("w") as output:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        listener.set_inheritable(True)
        before = os.dup(1)
        os.dup2(output.fileno(), 1)
        try:
            model = start()
            child = building(model)["pid"]
        finally:
            os.dup2(before, 1)
            os.close(before)
        ours = {os.readlink(f"/proc/self/fd/{each.fileno()}") for each in (listener, output)}
        theirs = {os.readlink(path) for path in Path(f"/proc/{child}/fd").iterdir()}
    (tmp_path / "go").touch()
    assert settled(model, archive)["backend"] == "aot_inductor"
    assert len(ours) == 2
    assert ours & theirs == set()


def test_a_build_that_its_time_limit_ended_is_remembered_and_the_next_backend_served(
    start: Start, archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BUILD_UNTIL", str(tmp_path / "never"))
    model = start()
    building(model)
    process = background(model)._process
    assert process is not None
    process.end("it took longer than the setting background.seconds: 1")  # as its timer does
    stays_eager(settled(model, archive), "it took longer than the setting background.seconds: 1")
    monkeypatch.delenv("BUILD_UNTIL")
    facts = settled(start(backends=["aot_inductor", "inductor", "eager"]), archive)
    assert (facts["backend"], facts["result"]) == ("inductor", "swapped")
    (fallback,) = facts["fallbacks"]
    assert fallback["backend"] == "aot_inductor"
    assert "a build failed" in fallback["reason"]
    assert "background.seconds: 1" in fallback["reason"]
    again = start(backends=["aot_inductor", "inductor", "eager"])
    assert (again.outcome.backend, again.outcome.result, again.background) == ("inductor", "hit", None)
    assert len(begun(tmp_path)) == 2


@pytest.mark.parametrize(
    ("limits", "reason"), [({"seconds": 0.2}, "background.seconds: 0.2"), ({"memory_mb": 1}, "background.memory_mb: 1")]
)
def test_limits_end_the_build(limits: dict[str, Any], reason: str, start: Start, archive: Path) -> None:
    stays_eager(settled(start(background=limits), archive), reason)


def test_artifact_that_fails_its_canary_here_is_not_swapped_in(
    start: Start, archive: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = file_backend.BACKEND.load

    def wrong(*arguments: Any) -> Any:
        loaded = load(*arguments)
        return dataclasses.replace(loaded, run=lambda tensors: loaded.run(tensors) * 1.5)

    monkeypatch.setattr(file_backend.BACKEND, "load", wrong)
    facts = settled(start(), archive)
    stays_eager(facts, "CanaryError")
    assert facts["counters"]["build"] == 1


def test_child_that_computes_another_key_does_not_build(
    start: Start, archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(file_backend.BACKEND, "toolchain", lambda request: "another")
    stays_eager(settled(start(), archive), "toolchain: 'another' there, 'test' here")
    assert begun(tmp_path) == []


def test_module_in_memory_is_served_eagerly_with_the_reason(tmp_path: Path) -> None:
    module = torch.nn.Linear(4, 3).eval()
    settings = settings_of(store=str(tmp_path / "store"), on_miss="background")
    model = start_model(ModuleSource("m", module), settings)
    assert background(model).wait(60)
    stays_eager(model.describe(), "no other process can make this model")
    assert model(ROWS).shape == (2, 3)


@needs_root
def test_read_only_store_is_not_built_for(start: Start, archive: Path, small_disk: Path, tmp_path: Path) -> None:
    (small_disk / "store").mkdir(mode=0o700)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    stays_eager(settled(start(store=str(small_disk / "store")), archive), "cannot be written")
    assert begun(tmp_path) == []

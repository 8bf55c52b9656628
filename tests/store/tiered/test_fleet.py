"""Three hosts with four workers each on an empty fleet: one build, whoever dies or stops meanwhile."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from tests.support.file_backend import START
from tests.support.models import eager_model
from tests.support.subprocesses import environment, finish, start_python
from ts_handlers.settings.sections import RemoteSettings

pytestmark = pytest.mark.processes

HEARTBEAT = 2.4
"""Seconds. A holder that lives renews its lease within 1.25 of them also where 14 processes share two cores."""
Run = Callable[..., list[dict[str, Any]]]


def begun(log: Path) -> int:
    return log.read_text().count("begin") if log.exists() else 0


def check(facts: dict[str, Any], archive: Path) -> dict[str, Any]:
    with torch.inference_mode():
        expected = eager_model(archive)(torch.ones(2, 4))
    assert torch.allclose(torch.tensor(facts["answer"]), expected, atol=1e-5)
    assert facts["fallbacks"] == []
    return facts


@pytest.fixture
def run(archive: Path, tmp_path: Path) -> Run:
    """Run three hosts whose clocks differ by a day, with `workers` each; returns what every worker tells."""

    def run(remote: dict[str, Any], workers: int = 4) -> list[dict[str, Any]]:
        log = {"BUILD_LOG": str(tmp_path / "builds"), "BUILD_SECONDS": "1"}
        hosts = [
            {"root": str(tmp_path / f"host-{number}"), "workers": workers, "skew": skew, "variables": log}
            for number, skew in enumerate((0.0, -86400.0, 86400.0))
        ]
        section = {"backends": ["aot_inductor"], "strict": True, "remote": remote}
        (tmp_path / "fleet.json").write_text(json.dumps({"archive": str(archive), "section": section, "hosts": hosts}))
        command = [sys.executable, "-m", "tests.support.fleet", str(tmp_path / "fleet.json")]
        done = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=300, check=False)
        assert done.returncode == 0, done.stderr
        return [check(json.loads(path.read_text()), archive) for path in sorted(tmp_path.glob("host-*/worker-*.json"))]

    return run


def total(workers: list[dict[str, Any]], counter: str) -> int:
    return sum(facts["counters"][counter] for facts in workers)


def entries(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "remote" / "entries").rglob("*.?"))


@pytest.mark.parametrize("lease", ["auto", pytest.param("redis", marks=pytest.mark.services)])
def test_twelve_workers_on_three_hosts_build_once(
    lease: str, run: Run, folder: RemoteSettings, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    service = request.getfixturevalue("redis_url") if lease == "redis" else lease
    workers = run({**msgspec.to_builtins(folder), "lease": service})
    assert len(workers) == 12
    assert begun(tmp_path / "builds") == 1
    assert total(workers, "build") == 1
    assert total(workers, "hit") == 11
    assert total(workers, "remote_hit") == 2  # one worker of each other host
    assert total(workers, "remote_failed") == total(workers, "takeover") == total(workers, "remote_refused") == 0
    assert len(entries(tmp_path)) == 1


@pytest.mark.parametrize("lease", ["auto", pytest.param("redis", marks=pytest.mark.services)])
def test_builder_that_is_killed_is_taken_over(
    lease: str, archive: Path, folder: RemoteSettings, tmp_path: Path, run: Run, request: pytest.FixtureRequest
) -> None:
    service = request.getfixturevalue("redis_url") if lease == "redis" else lease
    remote = {**msgspec.to_builtins(folder), "lease": service, "heartbeat_seconds": HEARTBEAT}
    killed = start_python(
        START,
        archive,
        tmp_path / "killed",
        json.dumps({"remote": remote}),
        KILL_AT="during build",
        BUILD_LOG=str(tmp_path / "builds"),
    )
    finish(killed, -signal.SIGKILL)
    workers = run(remote, workers=2)
    assert begun(tmp_path / "builds") == 2
    assert total(workers, "build") == 1
    assert total(workers, "takeover") == 1
    assert len(entries(tmp_path)) == 1


def test_builder_that_is_stopped_is_taken_over_and_never_publishes(
    archive: Path, folder: RemoteSettings, tmp_path: Path, run: Run
) -> None:
    log, gate = tmp_path / "builds", tmp_path / "gate"
    remote = {**msgspec.to_builtins(folder), "heartbeat_seconds": HEARTBEAT}
    stopped = start_python(
        START,
        archive,
        tmp_path / "stopped",
        json.dumps({"remote": remote}),
        BUILD_LOG=str(log),
        BUILD_UNTIL=str(gate),
    )
    while begun(log) == 0:
        assert stopped.poll() is None
        time.sleep(0.02)
    os.kill(stopped.pid, signal.SIGSTOP)
    workers = run(remote, workers=1)
    assert total(workers, "build") == 1
    assert total(workers, "takeover") == 1
    (entry,) = entries(tmp_path)
    before = entry.read_bytes()
    gate.touch()
    os.kill(stopped.pid, signal.SIGCONT)
    facts = check(json.loads(finish(stopped).splitlines()[-1]), archive)
    assert facts["result"] == "built"
    assert facts["counters"]["write_back"] == 0
    assert entries(tmp_path) == [entry]
    assert entry.read_bytes() == before

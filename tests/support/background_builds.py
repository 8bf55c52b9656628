"""Background builds in tests: what has begun, what has become of them, and processes that serve meanwhile."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests.support.models import eager_model
from tests.support.subprocesses import REPOSITORY, SUPPORT, finish, start_python
from ts_handlers import CompiledModel
from ts_handlers.startup.background.build import BackgroundBuild

CHILD_SITE = SUPPORT / "child_site"
ROWS = torch.arange(8.0).reshape(2, 4)
Start = Callable[..., CompiledModel]


def background(model: CompiledModel) -> BackgroundBuild:
    assert model.background is not None
    return model.background


def settled(model: CompiledModel, archive: Path) -> dict[str, Any]:
    """Wait until the build is over; the model answers as eager does before and after."""
    while True:
        over = background(model).wait(0.02)
        with torch.inference_mode():
            assert torch.allclose(model(ROWS), eager_model(archive)(ROWS), atol=1e-5)
        if over:
            break
    facts = model.describe()
    json.dumps(facts)
    return facts


def counters(facts: dict[str, Any]) -> dict[str, int]:
    return {name: count for name, count in facts["counters"].items() if count}


def stays_eager(facts: dict[str, Any], reason: str) -> None:
    assert (facts["backend"], facts["result"]) == ("eager", "background")
    assert facts["background"]["state"] == "failed"
    assert reason in facts["background"]["reason"], facts["background"]
    assert facts["counters"]["background_failed"] == 1
    assert facts["counters"]["swap"] == 0


def building(model: CompiledModel) -> dict[str, Any]:
    """Wait until the child compiles."""
    while True:
        facts = background(model).describe()
        if facts["phase"] == "build: compile" or background(model).wait(0.02):
            return facts


def begun(tmp_path: Path) -> list[int]:
    """Ids of the processes that have begun to build."""
    path = tmp_path / "builds"
    lines = path.read_text().splitlines() if path.exists() else []
    return [int(line.split()[1]) for line in lines if line.startswith("begin")]


SERVE = """
    import json, sys
    import torch
    from tests.support.file_backend import use_file_backend
    from tests.support.models import archive_source, settings_of
    from ts_handlers import start_model
    use_file_backend()
    archive, store = sys.argv[1:3]
    section = {"store": store, "backends": ["aot_inductor", "eager"], "background": {"nice": 0}}
    settings = settings_of(**section, on_miss="background")
    model = start_model(archive_source(archive), settings)
    print(json.dumps(model.describe()["result"]), flush=True)
    model.background.wait()
    print(json.dumps({**model.describe(), "answer": model(torch.ones(2, 4)).tolist()}))
"""
"""A process that serves an archive's model, and ends when the background build has."""


def wait_for_end(pid: int) -> None:
    """Wait for a process that nobody is left to wait for."""
    while Path(f"/proc/{pid}").exists() and " Z " not in Path(f"/proc/{pid}/stat").read_text():
        time.sleep(0.02)


def serve(archive: Path, tmp_path: Path, code: str = SERVE, **env: str) -> subprocess.Popen[str]:
    """A process that serves the archive, once it has started eagerly."""
    path = os.pathsep.join([str(CHILD_SITE), str(REPOSITORY)])
    process = start_python(code, archive, tmp_path / "store", fresh=True, PYTHONPATH=path, **env)
    assert process.stdout is not None
    assert json.loads(process.stdout.readline()) == "background"
    return process


def ended(process: subprocess.Popen[str], archive: Path) -> dict[str, Any]:
    facts: dict[str, Any] = json.loads(finish(process).splitlines()[-1])
    with torch.inference_mode():
        assert torch.allclose(torch.tensor(facts["answer"]), eager_model(archive)(torch.ones(2, 4)), atol=1e-5)
    return facts

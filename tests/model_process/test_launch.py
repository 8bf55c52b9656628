"""How a model's process is started, and when its start is given up."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.subprocesses import environment, run_python, start_python
from ts_handlers.system.child_python import run_module


@pytest.mark.processes
def test_a_child_looks_for_modules_where_it_is_told_and_not_where_it_begins(tmp_path: Path) -> None:
    for name in ("here", "told"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "shadowed.py").write_text(f"def main():\n    print({name!r})\n")
    command = run_module("shadowed")
    env = environment(PYTHONPATH=str(tmp_path / "told"))
    found = subprocess.run(command, cwd=tmp_path / "here", env=env, capture_output=True, text=True, check=True)
    assert found.stdout == "told\n"


@pytest.mark.processes
def test_workers_behind_torchs_launcher_have_the_same_server() -> None:
    worker = "from ts_handlers.model_process.launch import parent_identity; print(parent_identity()[0])"
    launcher = "import subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[2]], check=True)"
    command = [sys.executable, "-c", launcher, "torch.backends.xeon.run_cpu", worker]
    found = subprocess.run(command, env=environment(), capture_output=True, text=True, check=True)
    assert int(found.stdout) == os.getpid()
    assert int(run_python(worker, fresh=True)) == os.getpid()


START = """
import sys, threading, time
from ts_handlers.model_process import __main__ as process

process.WATCH_SECONDS, process.HANGS_SECONDS, process.BUILD_HANGS_SECONDS = 0.02, 0.3, 60.0
wanted, phase = sys.argv[1] == "wanted", sys.argv[2]
watch = process.StartWatch(lambda: True, lambda: wanted)
threading.Thread(target=watch.run, daemon=True).start()
for _ in range(6):
    watch.phase_begins(phase)
    time.sleep(0.1)
print("goes on", flush=True)
time.sleep(1.5)
"""


@pytest.mark.parametrize(
    ("wanted", "phase", "status"),
    [("wanted", "load", 0), ("alone", "build: compile", 0), ("alone", "load", 71)],
)
def test_a_start_that_hangs_is_given_up_when_the_worker_that_asked_for_it_is_gone(
    wanted: str, phase: str, status: int
) -> None:
    process = start_python(START, wanted, phase)
    out, err = process.communicate(timeout=60)
    assert process.returncode == status
    assert out == "goes on\n"  # each phase has its own time
    assert ("the worker that asked for it is gone" in err) == (status != 0)

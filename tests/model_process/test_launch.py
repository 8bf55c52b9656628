"""How a model's process is started, and when its start is given up."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.support.subprocesses import environment, run_python, start_python


@pytest.mark.processes
def test_workers_behind_torchs_launcher_have_the_same_server() -> None:
    worker = "from ts_handlers.model_process.launch import parent_identity; print(parent_identity()[0])"
    launcher = "import subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[2]], check=True)"
    command = [sys.executable, "-c", launcher, "torch.backends.xeon.run_cpu", worker]
    found = subprocess.run(command, env=environment(), capture_output=True, text=True, check=True)
    assert int(found.stdout) == os.getpid()
    assert int(run_python(worker, fresh=True)) == os.getpid()


START = """
import sys, threading, types
from ts_handlers.model_process import __main__ as process

process.WATCH_SECONDS, process.HANGS_SECONDS, process.BUILD_HANGS_SECONDS = 0.01, 0.3, 60.0
clock, looked = [0.0], threading.Semaphore(0)
process.time = types.SimpleNamespace(monotonic=lambda: clock[0])

def wanted():
    looked.release()
    return sys.argv[1] == "wanted"

def wait_for_looks():
    while looked.acquire(blocking=False):
        pass
    for _ in range(3):  # the second of these looks begins after this call, and is over when the third begins
        looked.acquire()

watch = process.StartWatch(lambda: True, wanted)
threading.Thread(target=watch.run, daemon=True).start()
for _ in range(6):
    watch.phase_begins(sys.argv[2])
    clock[0] += 0.2
    wait_for_looks()
print("goes on", flush=True)
clock[0] += 10.0
wait_for_looks()
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

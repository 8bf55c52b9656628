"""Child processes: what they import, what they are told, and that they end with their parent."""

from __future__ import annotations

import json
import signal
import subprocess
import textwrap
from pathlib import Path

import pytest

from tests.support.subprocesses import environment, start_python
from tests.support.workers import is_alive, wait_until
from ts_handlers.system.child_process import run_module, start_child

pytestmark = pytest.mark.processes


def test_a_child_looks_for_modules_where_it_is_told_and_not_where_it_begins(tmp_path: Path) -> None:
    for name in ("here", "told"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "shadowed.py").write_text(f"def main():\n    print({name!r})\n")
    command = run_module("shadowed")
    env = environment(PYTHONPATH=str(tmp_path / "told"))
    found = subprocess.run(command, cwd=tmp_path / "here", env=env, capture_output=True, text=True, check=True)
    assert found.stdout == "told\n"


def test_a_child_gets_its_specification_and_the_variables(tmp_path: Path) -> None:
    code = """
    import json, os
    from ts_handlers.system.child_process import read_specification

    def main():
        facts = {"spec": read_specification(), "bound": os.environ["BOUND"], "folder": os.getcwd()}
        print(json.dumps(facts))
        return 3
    """
    (tmp_path / "module_of_the_test.py").write_text(textwrap.dedent(code))
    process = start_child(
        "module_of_the_test",
        {"text": "\u00e4" * 100_000},
        search=[str(tmp_path)],
        variables={"BOUND": "2"},
        stdout=subprocess.PIPE,
    )
    assert process.stdout is not None
    assert json.loads(process.stdout.read()) == {"spec": {"text": "\u00e4" * 100_000}, "bound": "2", "folder": "/"}
    assert process.wait(60) == 3


def test_a_child_that_dies_before_it_reads_raises_nothing() -> None:
    process = start_child("this_module_is_nowhere", {"text": "x" * 1_000_000}, stderr=subprocess.DEVNULL)
    assert process.wait(60) == 1


@pytest.mark.processes
def test_a_child_and_what_it_started_end_when_its_parent_is_killed() -> None:
    child_code = """
    import os, subprocess, sys
    from ts_handlers.system.child_process import end_with_parent
    end_with_parent(int(sys.argv[1]))
    below = subprocess.Popen(["sleep", "600"])
    print(os.getpid(), below.pid, flush=True)
    below.wait()
    """
    parent_code = """
    import os, subprocess, sys
    subprocess.run([sys.executable, "-c", sys.argv[1], str(os.getpid())])
    """
    parent = start_python(parent_code, textwrap.dedent(child_code))
    assert parent.stdout is not None
    child, below = map(int, parent.stdout.readline().split())
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    assert wait_until(lambda: not is_alive(child) and not is_alive(below))

"""A forked process is to a test what a new interpreter is."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.support.subprocesses import finish, run_python, start_python
from tests.support.workers import is_stopped, wait_until

FACTS = """
    import json, os, random, signal, sys, threading
    import torch
    print(json.dumps({
        "seed": torch.initial_seed(), "random": random.random(), "arguments": sys.argv,
        "path": sys.path, "folder": os.getcwd(), "variable": os.environ.get("VARIABLE"),
        "home": os.environ["HOME"], "threads": threading.active_count(), "main": __name__,
        "torch_threads": torch.get_num_threads(), "package": "ts_handlers" in sys.modules,
        "descriptors": len(os.listdir("/proc/self/fd")), "blocked": len(signal.pthread_sigmask(signal.SIG_BLOCK, [])),
        "handlers": [str(signal.getsignal(number)).split(" at ")[0] for number in (2, 13, 15, 17)],
    }))
"""


@pytest.mark.parametrize("threads", ["1", None])
def test_a_fork_sees_what_a_new_interpreter_sees(
    threads: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("OMP_NUM_THREADS", "PYTHONSTARTUP"):
        monkeypatch.delenv(name, raising=False)
    env = {"VARIABLE": "value", "HOME": str(tmp_path), **({"OMP_NUM_THREADS": threads} if threads else {})}
    forked = json.loads(run_python(FACTS, "one", Path("two"), **env))
    other = json.loads(run_python(FACTS, "one", Path("two"), **env))
    fresh = json.loads(run_python(FACTS, "one", Path("two"), fresh=True, **env))
    numbers = {(each.pop("seed"), each.pop("random")) for each in (forked, fresh, other)}
    assert len(numbers) == 3
    assert forked == other == fresh
    assert forked["package"] is False


@pytest.mark.parametrize(
    ("code", "status", "error"),
    [
        ("import sys; sys.exit()", 0, ""),
        ("import sys; sys.exit(7)", 7, ""),
        ("import sys; sys.exit('why')", 1, "why\n"),
        ("import os; os._exit(9)", 9, ""),
        ("raise KeyError('k')", 1, "KeyError: 'k'\n"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", -signal.SIGKILL, ""),
        ("import ctypes; ctypes.string_at(0)", -signal.SIGSEGV, ""),
        ("import os; os.abort()", -signal.SIGABRT, ""),
    ],
)
def test_ends_arrive(code: str, status: int, error: str) -> None:
    process = start_python(f"import resource; resource.setrlimit(resource.RLIMIT_CORE, (0, 0)); {code}")
    out, text = process.communicate(timeout=60)
    assert (process.returncode, out) == (status, "")
    assert text.endswith(error) if error else text == ""
    assert process.poll() == process.wait() == status


def test_threads_and_exit_handlers_run_before_the_end() -> None:
    code = """
        import atexit, threading, time
        atexit.register(print, "handler")
        threading.Thread(target=lambda: (time.sleep(0.05), print("thread"))).start()
        print("code")
    """
    assert run_python(code) == "code\nthread\nhandler\n"


def test_parallel_regions_work_in_every_fork() -> None:
    code = """
        import torch
        torch.set_num_threads(2)
        print(float(torch.ones(1 << 20).sum()))
    """
    assert [run_python(code) for _ in range(3)] == ["1048576.0\n"] * 3


def test_a_dialogue_and_signals(tmp_path: Path) -> None:
    with (tmp_path / "log").open("wb") as log:
        code = """
            import sys
            for line in sys.stdin:
                print(line.upper(), end="", flush=True)
                print("said", file=sys.stderr)
        """
        process = start_python(code, stdin=subprocess.PIPE, stderr=log)
    process.stdin.write("hello\n")
    process.stdin.flush()
    assert process.stdout.readline() == "HELLO\n"
    assert process.poll() is None
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.01)
    process.send_signal(signal.SIGSTOP)
    assert wait_until(lambda: is_stopped(process.pid))
    process.send_signal(signal.SIGCONT)
    assert finish(process) == ""
    assert (tmp_path / "log").read_text() == "said\n"


def test_output_beyond_a_pipe_and_many_at_once() -> None:
    children = [start_python(f"print('{number}' * 1_000_000)") for number in range(4)]
    assert [finish(child) for child in children] == [f"{number}" * 1_000_000 + "\n" for number in range(4)]


def test_a_timeout_leaves_the_process() -> None:
    process = start_python("import time; time.sleep(600)")
    before = time.monotonic()
    with pytest.raises(subprocess.TimeoutExpired):
        process.communicate(timeout=0.05)
    assert time.monotonic() - before < 300
    process.kill()
    assert process.wait(60) == -signal.SIGKILL


def test_what_a_fork_reads_too_late_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="PYTHONHASHSEED: read before a fork; say fresh=True"):
        run_python("pass", PYTHONHASHSEED="1")
    (tmp_path / "sitecustomize.py").touch()
    with pytest.raises(AssertionError, match="say fresh=True"):
        run_python("pass", PYTHONPATH=str(tmp_path))

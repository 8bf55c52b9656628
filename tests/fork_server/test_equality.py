"""A process of the fork server is what a new interpreter is, or it is a new interpreter."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest

from tests.fork_server.conftest import SCRIPT, MakePlace, Place
from tests.support.workers import wait_until
from ts_handlers.fork_server.client import is_for_fork_server
from ts_handlers.fork_server.environment import SearchPath, difference, paths_of
from ts_handlers.fork_server.preload import openblas_threads
from ts_handlers.fork_server.server import refusal
from ts_handlers.fork_server.start import facts_of

FACTS = """
import json, logging, os, resource, signal, sys, tempfile, threading
ignored = [number for number in signal.valid_signals() if signal.getsignal(number) is signal.SIG_IGN]
print(json.dumps({
    "argv": sys.argv, "orig": sys.orig_argv, "path": sys.path, "executable": sys.executable, "cwd": os.getcwd(),
    "environment": dict(os.environ), "main": sorted(vars(sys.modules["__main__"])), "file": __file__, "name": __name__,
    "streams": [[s.line_buffering, s.write_through, s.encoding, s.errors] for s in (sys.stdin, sys.stdout, sys.stderr)],
    "temporary": tempfile.gettempdir(), "ignored": ignored, "interrupt": str(signal.getsignal(signal.SIGINT).__name__),
    "blocked": sorted(signal.pthread_sigmask(signal.SIG_BLOCK, ())), "umask": os.umask(0),
    "loggers": logging.root.handlers,
    "limits": open("/proc/self/limits").read(), "native": threading.main_thread().native_id == os.getpid(),
    "threads": len(os.listdir("/proc/self/task")), "flags": list(sys.flags), "nice": os.nice(0),
}, indent=1))
"""
HOW_IT_ENDS = {
    "returns": "print('done')",
    "exits": "import sys; print('out'); sys.exit(7)",
    "exits with a text": "import sys; sys.exit('nothing to do')",
    "raises": "def f():\n    raise ValueError('five')\nf()",
    "does not compile": "def f(:",
    "terminates itself": "import os; os.kill(os.getpid(), 15)",
    "is killed": "import os; os.kill(os.getpid(), 9)",
    "is interrupted": "import os, signal; os.kill(os.getpid(), 2); signal.pause()",
    "dies in native code": "import ctypes, resource; resource.setrlimit(4, (0, 0)); ctypes.string_at(0)",
    "runs exit handlers": "import atexit; atexit.register(print, 'bye'); print('hi')",
    "reads": "print(len(input()))",
}


def test_facts_of_a_fork_are_those_of_a_new_interpreter(place: Place) -> None:
    extra = place.work / "extra"
    extra.mkdir()
    # As TorchServe does: the archive's folder behind the server's, and an empty entry.
    path = os.pathsep.join([place.variables["PYTHONPATH"], str(extra), ""])
    fork, new = (place.run(FACTS, "a", "b c", forked=forked, PYTHONPATH=path) for forked in (True, False))
    assert fork == new
    assert place.is_forked() == (True, "")


@pytest.mark.parametrize("how", HOW_IT_ENDS)
def test_exit_codes_and_outputs_arrive_unchanged(place: Place, how: str) -> None:
    fork, new = (place.run(HOW_IT_ENDS[how], forked=forked) for forked in (True, False))
    assert fork == new


def test_limits_and_ignored_signals_of_the_caller_are_taken(place: Place) -> None:
    code = "import sys, resource, signal; print('fork_server_mark' in sys.modules, resource.getrlimit(7))"
    code += "\nprint([signal.getsignal(number) is signal.SIG_IGN for number in (1, 2, 10)])"
    script = place.work / SCRIPT[1:]
    script.write_text(code)
    caller = f"trap '' HUP INT; ulimit -n 300; exec {place.stand_in} {script}"
    output = subprocess.run(["sh", "-c", caller], env=place.variables, capture_output=True, text=True, check=True)
    assert output.stdout == "True (300, 300)\n[True, True, False]\n"
    ours = [signal.getsignal(number) is signal.SIG_IGN for number in (1, 2, 10)]
    assert place.run(code)[1].endswith(f"{ours}\n")


def test_random_numbers_and_temporary_names_differ_between_forks(make: MakePlace) -> None:
    place = make("torch", "numpy.random", "random", "tempfile", "uuid")
    code = """
    import random, tempfile, uuid, numpy, torch
    names = next(tempfile._get_candidate_names()), uuid.uuid4()
    print(random.random(), numpy.random.rand(), torch.rand(1).item(), *names)
    """
    first, second = (place.run(code)[1].split() for _ in range(2))
    assert len(first) == 5
    assert all(one != other for one, other in zip(first, second, strict=True))
    assert place.is_forked() == (True, "")


def test_threads_of_torch_and_numpy_are_those_of_a_new_process(make: MakePlace) -> None:
    place = make("torch")
    code = """
    import ctypes, os, re, numpy, torch
    from ts_handlers.fork_server.preload import _SETTERS, openblas_libraries
    found = []
    for path in openblas_libraries():
        library = ctypes.CDLL(path)
        names = [form.format("get_num_threads") for form in _SETTERS]
        found += [getattr(library, name)() for name in names if hasattr(library, name)]
    a = torch.rand(300, 300)
    (a @ a).sum().item(), numpy.dot(a.numpy(), a.numpy())
    print(torch.get_num_threads(), torch.get_num_interop_threads(), found, os.environ.get("OPENBLAS_NUM_THREADS"))
    """
    fork, new = (place.run(code, forked=forked) for forked in (True, False))
    assert fork == new
    assert place.is_forked() == (True, "")


@pytest.mark.parametrize("name", ["OMP_NUM_THREADS", "LD_BIND_NOW", "MALLOC_ARENA_MAX", "KMP_AFFINITY", "SOMETHING"])
def test_another_environment_makes_an_ordinary_process_that_says_so(place: Place, name: str) -> None:
    forked, said = place.is_forked(**{name: "1"})
    assert not forked
    assert said == (
        f"ts_handlers: this process starts without the fork server: the environment differs from its own in {name}\n"
    )


def test_a_file_that_takes_a_modules_place_makes_an_ordinary_process(place: Place) -> None:
    folder = place.work / "archive"
    folder.mkdir()
    path = f"{place.variables['PYTHONPATH']}{os.pathsep}{folder}"
    assert place.is_forked(PYTHONPATH=path) == (True, "")
    (folder / "json.py").write_text("")
    forked, said = place.is_forked(PYTHONPATH=path)
    assert not forked
    assert f"{folder}/json.py would take the place of a module" in said
    assert not place.is_forked(PYTHONPATH=str(folder))[0]  # without what the server's path begins with


def test_a_changed_file_makes_the_server_start_anew(make: MakePlace) -> None:
    place = make("changing", changing="VALUE = 1")
    code = "import sys; print('fork_server_mark' in sys.modules); import changing; print(changing.VALUE)"
    assert place.run(code) == (0, "True\n1\n", "")
    (place.modules / "changing.py").write_text("VALUE = 22")
    _, out, said = place.run(code)
    assert out == "False\n22\n"
    assert "has changed since it was imported" in said
    assert place.run(code) == (0, "True\n22\n", "")


def test_modules_that_are_new_since_the_imports_are_found(place: Place) -> None:
    name = f"written_later_{os.getpid()}"
    code = f"import sys; print('fork_server_mark' in sys.modules)\nimport {name}"
    assert place.run(code)[0] == 1
    (place.modules / f"{name}.py").write_text("")
    assert place.run(code) == (0, "True\n", "")


def test_modules_after_which_no_fork_is_safe_are_left_out(make: MakePlace) -> None:
    bad = {
        "threads": "import threading, time\nthreading.Thread(target=time.sleep, args=(60,), daemon=True).start()",
        "opens": "file = open(__file__)",
        "logs": "import logging\nlogging.basicConfig()",
        "handles": "import signal\nsignal.signal(signal.SIGTERM, lambda *_: None)",
        "searches": "import sys\nsys.path.append('/nowhere')",
        "forks": "import subprocess\nprocess = subprocess.Popen(['sleep', '1'])",
        "fails": "raise OSError('no such device')",
    }
    place = make(*bad, "good", **bad, good="import os\nos.environ['GOOD'] = 'set by an import'")
    facts = facts_of(place.server.socket)
    assert facts["modules"] == ["fork_server_mark", "good"]
    assert facts["failed"] == {
        "threads": "it started 1 thread(s)",
        "opens": f"it left a file open: {place.modules}/opens.py",
        "logs": "it configured the root logger",
        "handles": "it set a signal handler",
        "searches": "it changed sys.path",
        "forks": "it started a process",
        "fails": "OSError: no such device",
    }
    code = "import os, sys; print('good' in sys.modules, 'threads' in sys.modules, os.environ['GOOD'])"
    assert place.run(code) == (0, "True False set by an import\n", "")


def test_what_is_not_the_script_runs_in_the_interpreter(place: Place) -> None:
    assert is_for_fork_server([f"/opt{SCRIPT}"], SCRIPT)
    for other in ([], ["-u", f"/opt{SCRIPT}"], ["-m", "json.tool"], ["/opt/other.py"], [SCRIPT[1:]]):
        assert not is_for_fork_server(other, SCRIPT)
    other = place.work / "other.py"
    other.write_text("import sys; print('fork_server_mark' in sys.modules, sys.argv[1:])")
    text = os.popen(f"PYTHONPATH={place.variables['PYTHONPATH']} {place.stand_in} -u {other} x").read()
    assert text == "False ['x']\n"


def test_the_file_in_the_interpreters_place_is_started_where_its_path_has_spaces(
    make: MakePlace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from ts_handlers.fork_server import start

    place = make()
    monkeypatch.setattr(start, "LONGEST_INTERPRETER", 0)
    place.stand_in = start.write_stand_in(place.server.socket, SCRIPT)
    assert place.stand_in.read_text().startswith("#!/bin/sh\n")
    assert place.is_forked() == (True, "")


def test_another_users_connection_is_refused() -> None:
    assert refusal(os.geteuid()) is None
    assert "is refused" in str(refusal(os.geteuid() + 1))


def test_variables_that_an_import_may_read_matter() -> None:
    assert difference({"A": "1", "PWD": "/"}, {"A": "1", "OLDPWD": "/x", "TS_HANDLERS_CACHE": "/s"}) is None
    many = {f"V{number}": "" for number in range(9)}
    assert difference({}, many) == "the environment differs from its own in V0, V1, V2, V3, V4 and others"


def test_paths_are_taken_as_the_interpreter_takes_them() -> None:
    assert paths_of({}, "/here") == []
    assert paths_of({"PYTHONPATH": "/a::rel:/a/:/b/../c"}, "/here") == ["/a", "/here", "/here/rel", "/c"]
    search = SearchPath({"PYTHONPATH": "/a"}, "/")
    assert search.of("/s/script.py", ["/a", "/b"])[:3] == ["/s", "/a", "/b"]
    assert "does not begin with its own" in str(search.problem(["/b", "/a"], set()))


@pytest.mark.parametrize(
    ("variables", "threads"),
    [({}, 8), ({"OMP_NUM_THREADS": "3"}, 3), ({"OPENBLAS_NUM_THREADS": "2", "OMP_NUM_THREADS": "3"}, 2)],
)
def test_openblas_takes_its_threads_from_the_variables(
    variables: dict[str, str], threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("OPENBLAS_NUM_THREADS", "OPENBLAS_DEFAULT_NUM_THREADS", "GOTO_NUM_THREADS", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert openblas_threads(8) == threads


def test_the_server_ends_with_its_leash_and_removes_its_folder(make: MakePlace) -> None:
    place = make()
    assert place.is_forked()[0]
    leash = os.dup(place.server.leash)
    os.dup2(os.open(os.devnull, os.O_RDONLY), place.server.leash)
    assert place.server.process.poll() is None
    os.close(leash)
    place.server.process.wait(60)
    assert wait_until(lambda: not place.server.socket.parent.exists())

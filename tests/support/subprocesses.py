"""Python code in processes of its own: forked from one that has imported torch, or in a fresh interpreter."""

from __future__ import annotations

import atexit
import contextlib
import functools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from tests.support.costs import costs

SUPPORT = Path(__file__).parent
REPOSITORY = SUPPORT.parents[1]
_HIDDEN = ("TS_HANDLERS_CACHE", "XDG_CACHE_HOME", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")
_AT_THE_BEGINNING = dict(os.environ)
"""Before any test has changed it."""
_READ_AT_THE_START = ("PYTHON", "LD_", "MALLOC_", "KMP_", "GOMP_", "MKL_", "OPENBLAS_", "TORCH_LOGS", "TORCH_TRACE")
"""Beginnings of the variables that the interpreter, the loader or torch's import reads, so that a fork is too late."""


def environment(**changes: str | None) -> dict[str, str]:
    """This process's environment with changes (None removes); modules of the tests and the package importable."""
    variables: dict[str, str | None] = {name: value for name, value in os.environ.items() if name not in _HIDDEN}
    variables["PYTHONPATH"] = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))
    variables.update(changes)
    return {name: value for name, value in variables.items() if value is not None}


class ForkedPython:
    """A process of the fork server, to be used as a `subprocess.Popen` in text mode."""

    def __init__(self, connection: socket.socket, pid: int, streams: Mapping[str, IO[str] | None]) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self.stdin, self.stdout, self.stderr = (streams[name] for name in ("stdin", "stdout", "stderr"))
        self._connection = connection

    def poll(self) -> int | None:
        """The exit code (negative: the signal), or None while the process runs."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the process; raises `subprocess.TimeoutExpired`."""
        if self.returncode is None:
            self._connection.settimeout(timeout if timeout is None else max(timeout, 1e-3))
            try:
                answer = self._connection.recv(4096)
            except TimeoutError:
                raise subprocess.TimeoutExpired(f"process {self.pid}", timeout or 0.0) from None
            assert answer, "the fork server has ended"
            self.returncode = int(json.loads(answer)["status"])
            self._connection.close()
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def communicate(self, input: None = None, timeout: float | None = None) -> tuple[str, str]:
        """Read both outputs to their ends, and wait; raises `subprocess.TimeoutExpired`."""
        deadline = None if timeout is None else time.monotonic() + timeout
        if self.stdin is not None:
            self.stdin.close()
        readers = [_Reader(stream) for stream in (self.stdout, self.stderr)]
        for reader in readers:
            reader.join(None if deadline is None else max(0.0, deadline - time.monotonic()))
            if reader.is_alive():
                raise subprocess.TimeoutExpired(f"process {self.pid}", timeout or 0.0)
        self.wait(None if deadline is None else deadline - time.monotonic())
        return readers[0].text, readers[1].text


class _Reader(threading.Thread):
    """Reads a stream to its end."""

    def __init__(self, stream: IO[str] | None) -> None:
        super().__init__(daemon=True)
        self.text = ""
        self._stream = stream
        self.start()

    def run(self) -> None:
        if self._stream is not None and not self._stream.closed:
            with self._stream:
                self.text = self._stream.read()


class ForkServer:
    """The client's side of ``fork_server.py``; one server for a worker of pytest, started by its first case."""

    def __init__(self) -> None:
        self._folder = tempfile.mkdtemp(prefix="forks-")
        self._path = os.path.join(self._folder, "socket")
        # One thread: OpenBLAS, which NumPy brings along, would otherwise start some as soon as it is imported.
        env = {**_AT_THE_BEGINNING, "OPENBLAS_NUM_THREADS": "1"}
        env.pop("OMP_NUM_THREADS", None)
        command = [sys.executable, str(SUPPORT / "fork_server.py"), self._path]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, env=env, cwd=REPOSITORY)
        atexit.register(self.close)

    def start(self, code: str, arguments: list[str], env: dict[str, str], stdin: Any, stdout: Any, stderr: Any) -> Any:
        """Fork a process; the streams are as in `subprocess.Popen`."""
        request = {"code": code, "arguments": arguments, "env": env, "cwd": os.getcwd(), "path": _search_path(env)}
        ours: dict[str, IO[str] | None] = {"stdin": None, "stdout": None, "stderr": None}
        theirs: list[int] = []
        opened: list[int] = []
        for name, wanted in (("stdin", stdin), ("stdout", stdout), ("stderr", stderr)):
            if wanted == subprocess.PIPE:
                read, write = os.pipe()
                mine, other = (write, read) if name == "stdin" else (read, write)
                ours[name] = os.fdopen(mine, "w" if name == "stdin" else "r")
                opened.append(other)
                theirs.append(other)
            elif wanted is None:
                null = os.open(os.devnull, os.O_RDWR)
                opened.append(null)
                theirs.append(null)
            else:
                theirs.append(wanted.fileno())
        connection = self._connect()
        socket.send_fds(connection, [json.dumps(request).encode()], theirs)
        for descriptor in opened:
            os.close(descriptor)
        answer = connection.recv(4096)
        assert answer, "the fork server has ended"
        return ForkedPython(connection, int(json.loads(answer)["pid"]), ours)

    def _connect(self) -> socket.socket:
        while True:
            connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
            try:
                connection.connect(self._path)
                return connection
            except (FileNotFoundError, ConnectionRefusedError):
                connection.close()
                assert self._process.poll() is None, "the fork server did not start"
                time.sleep(0.01)

    def close(self) -> None:
        """End the server; its children go on."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.terminate()
        self._process.wait()
        shutil.rmtree(self._folder, ignore_errors=True)


@functools.cache
def _fork_server(pid: int) -> ForkServer:
    return ForkServer()


def _search_path(env: Mapping[str, str]) -> list[str]:
    """What a new interpreter has in ``sys.path`` behind its first entry."""
    named = [os.path.abspath(each) for each in env.get("PYTHONPATH", "").split(os.pathsep) if each]
    customized = [each for each in named if os.path.exists(os.path.join(each, "sitecustomize.py"))]
    assert not customized, f"{customized}: read before a fork; say fresh=True"
    return list(dict.fromkeys([*named, *_interpreters_own_path()]))


@functools.cache
def _interpreters_own_path() -> list[str]:
    code = "import json, sys; print(json.dumps(sys.path[1:]))"
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    found = subprocess.run([sys.executable, "-c", code], env=env, stdout=subprocess.PIPE, check=True)
    return list(json.loads(found.stdout))


@costs("processes")
def start_python(
    code: str,
    *arguments: object,
    fresh: bool = False,
    stdin: Any = None,
    stdout: Any = subprocess.PIPE,
    stderr: Any = subprocess.PIPE,
    **env: str | None,
) -> Any:
    """Start a process that runs `code` with `arguments` in ``sys.argv[1:]``.

    The process is forked from one that has imported torch. `fresh` starts an interpreter instead, for what needs one:
    torch that is not imported, what the interpreter or torch's import reads, and the parent that is this process.
    """
    code, words = textwrap.dedent(code), [str(each) for each in arguments]
    early = [name for name in env if name.startswith(_READ_AT_THE_START) and name != "PYTHONPATH"]
    if fresh:
        command = [sys.executable, "-c", code, *words]
        variables = environment(**env)
        return subprocess.Popen(command, stdin=stdin, stdout=stdout, stderr=stderr, text=True, env=variables)
    assert not early, f"{', '.join(early)}: read before a fork; say fresh=True"
    return _fork_server(os.getpid()).start(code, words, environment(**env), stdin, stdout, stderr)


def finish(process: Any, code: int = 0) -> str:
    """Wait for a process, check its exit code and return what it printed."""
    out, err = process.communicate(timeout=300)
    assert process.returncode == code, f"exit code {process.returncode}, expected {code}\n{out}\n{err}"
    return str(out)


def run_python(code: str, *arguments: object, fresh: bool = False, **env: str | None) -> str:
    """Run `code` in a process of its own, as `start_python` does, and return what it printed."""
    return finish(start_python(code, *arguments, fresh=fresh, **env))


def open_to_others(folder: Path) -> None:
    """Let other users pass through pytest's temporary folders to this one."""
    top = Path(tempfile.gettempdir()).resolve()
    for each in (folder, *folder.parents):
        if each == top or each.parent == each:
            return
        if each.stat().st_uid == os.geteuid():
            each.chmod(0o755)

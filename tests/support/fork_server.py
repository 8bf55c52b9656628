"""A process that has imported torch, and nothing of the package, and forks itself for every case that asks.

    python fork_server.py SOCKET

A case sends one request with its standard streams and gets two messages of JSON back: the process id, and, once the
process has ended, its status. The child runs the code as ``python -c`` would, with threads waited for, its exit
handlers, its traceback and its exit code. The server ends when its standard input does: with the test run.

The server has one thread at every fork, and never runs a parallel region: a pool of OpenMP's threads does not survive a
fork, and a child that would use it hangs.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import json
import os
import selectors
import signal
import socket
import sys
import tempfile
import threading
import types
from typing import Any

import torch

MAXIMUM_REQUEST = 1 << 20
"""Bytes of one request. A client sends it before it waits, so that the server is never kept."""


class Server:
    """Accepts requests, forks, and tells each client how its process ended."""

    def __init__(self, path: str) -> None:
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.bind(path)
        self._listener.listen(64)
        self._woken, self._waker = os.pipe()
        os.set_blocking(self._waker, False)
        self._clients: dict[int, socket.socket] = {}
        self._selector = selectors.DefaultSelector()
        for each in (self._listener, self._woken, 0):
            self._selector.register(each, selectors.EVENT_READ)
        signal.signal(signal.SIGCHLD, lambda *_: None)  # without a handler, Python does not write to the waker
        signal.set_wakeup_fd(self._waker, warn_on_full_buffer=False)

    def serve(self) -> dict[str, Any]:
        """Serve until standard input ends. In a child, returns what it has to do."""
        while True:
            for key, _ in self._selector.select():
                if key.fd == 0:
                    sys.exit(0)
                elif key.fd == self._woken:
                    os.read(self._woken, 4096)
                    self._report_the_ended()
                elif (request := self._accept()) is not None:
                    return request

    def _accept(self) -> dict[str, Any] | None:
        client, _ = self._listener.accept()
        data, streams, _, _ = socket.recv_fds(client, MAXIMUM_REQUEST, 3)
        request: dict[str, Any] = json.loads(data)
        _check_that_a_fork_is_safe()
        child = os.fork()
        if child == 0:
            self._leave(client)
            for number, stream in enumerate(streams):
                os.dup2(stream, number)
                os.close(stream)
            return request
        for stream in streams:
            os.close(stream)
        self._clients[child] = client
        _tell(client, {"pid": child})
        return None

    def _leave(self, client: socket.socket) -> None:
        """Close in a child what belongs to the server."""
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        self._selector.close()
        for each in (self._listener, client, *self._clients.values()):
            each.close()
        os.close(self._woken)
        os.close(self._waker)

    def _report_the_ended(self) -> None:
        while self._clients:
            child, status = os.waitpid(-1, os.WNOHANG)
            if child == 0:
                return
            client = self._clients.pop(child)
            _tell(client, {"status": os.waitstatus_to_exitcode(status)})
            client.close()


def _tell(client: socket.socket, facts: dict[str, int]) -> None:
    with contextlib.suppress(OSError):  # nobody wants to know any more
        client.send(json.dumps(facts).encode())


def _check_that_a_fork_is_safe() -> None:
    assert len(os.listdir("/proc/self/task")) == 1, "the fork server has several threads"
    assert not torch.cuda.is_initialized(), "CUDA does not survive a fork"
    assert not {"ts_handlers", "numpy.random"} & set(sys.modules)  # the latter would give all children the same numbers


def become(request: dict[str, Any]) -> None:
    """Make this child what a new interpreter would be."""
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    sys.argv = ["-c", *request["arguments"]]
    sys.path[:] = ["", *request["path"]]
    torch.default_generator.seed()  # from the system, as at torch's import; `random` does so by itself
    tempfile.tempdir = None  # from TMPDIR, when it is asked for
    if threads := request["env"].get("OMP_NUM_THREADS"):
        torch.set_num_threads(int(threads))
    main = types.ModuleType("__main__")
    main.__dict__["__builtins__"] = __builtins__
    sys.modules["__main__"] = main


def run(code: str) -> int:
    """Run a case's code and what it registered for its end; returns the exit code."""
    status = 0
    try:
        exec(compile(code, "<string>", "exec"), sys.modules["__main__"].__dict__)
    except SystemExit as end:
        if end.code is not None:
            status = end.code if isinstance(end.code, int) else 1
            if not isinstance(end.code, int):
                print(end.code, file=sys.stderr)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        status = 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            status = status or 120  # as the interpreter does
    return status & 0xFF


if __name__ == "__main__":
    del sys.path[0]  # the folder of this file
    gc.collect()
    gc.freeze()  # a collection in a child would otherwise write to, and so copy, every page of torch's objects
    todo = Server(sys.argv[1]).serve()
    become(todo)
    # Without the interpreter's own end, which takes all of torch's objects apart: 0.4 s of a processor for each case.
    os._exit(run(todo["code"]))

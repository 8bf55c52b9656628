"""What a fork of the fork server does: it takes a client's request, and becomes what a new interpreter would be."""

from __future__ import annotations

import builtins
import contextlib
import fcntl
import importlib.machinery
import json
import os
import random
import resource
import select
import signal
import socket
import sys
import tempfile
import threading
import types
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from ts_handlers.fork_server.client import END, FACTS, GO, MAGIC, READY, REFUSED, RUN, process_state
from ts_handlers.fork_server.environment import Imported, SearchPath, difference, paths_of
from ts_handlers.fork_server.preload import Preload, give_openblas_its_threads
from ts_handlers.system.processes import count_age_from

REQUEST_SECONDS = 10.0
"""How long a client may take to send its request."""
MOST_BYTES = 16 << 20
_F_SETSIG = 10
_APPLIED = (b"SigIgn", b"SigBlk")
_LIMIT_NAMES = {
    "Max cpu time": "CPU",
    "Max file size": "FSIZE",
    "Max data size": "DATA",
    "Max stack size": "STACK",
    "Max core file size": "CORE",
    "Max resident set": "RSS",
    "Max processes": "NPROC",
    "Max open files": "NOFILE",
    "Max locked memory": "MEMLOCK",
    "Max address space": "AS",
    "Max pending signals": "SIGPENDING",
    "Max msgqueue size": "MSGQUEUE",
    "Max nice priority": "NICE",
    "Max realtime priority": "RTPRIO",
    "Max realtime timeout": "RTTIME",
}


class Refused(Exception):
    """This fork would not be what the client's process has to be; the message says why."""


class Changed(Refused):
    """A file of an imported module is not as it was, so that no fork of this server is of use any more."""


class Parent:
    """What a fork has to know of the fork server.

    Attributes
    ----------
    environment, directory, search_path:
        As they were when it was started.
    imported, preload:
        What it has imported.
    openblas:
        Libraries that have one thread only.
    """

    def __init__(self, environment: Mapping[str, str], search_path: SearchPath) -> None:
        self.environment = dict(environment)
        self.directory = os.getcwd()
        self.search_path = search_path
        self.preload = Preload()
        self.imported = Imported()
        self.openblas: list[str] = []

    def facts(self) -> dict[str, Any]:
        """What it tells of itself."""
        preload = self.preload
        return {
            "pid": os.getppid(),
            "python": sys.executable,
            "version": sys.version,
            "modules": preload.modules,
            "failed": preload.failed,
            "changed": self.imported.changed(),
        }


class Request:
    """A client's request: what the process has to be.

    Raises
    ------
    Refused, OSError
        It is not one.
    """

    def __init__(self, connection: socket.socket) -> None:
        connection.settimeout(REQUEST_SECONDS)
        body, descriptors = _receive(connection)
        fields = body.split(b"\0")
        self.kind = fields[0]
        if self.kind != RUN:
            return
        self.client, self.directory, limits = int(fields[1]), os.fsdecode(fields[2]), fields[3].decode()
        self.limits = _limits(limits)
        counts = [int(each) for each in fields[4:7]]
        words, variables, state = _split(fields[7:], counts)
        self.interpreter, *self.arguments = [os.fsdecode(each) for each in words]
        self.environment = {
            os.fsdecode(name): os.fsdecode(value) for name, _, value in (each.partition(b"=") for each in variables)
        }
        self.state = {name: value for name, _, value in (each.partition(b"=") for each in state)}
        self.lifeline = socket.socket(fileno=descriptors.pop())

    @property
    def script(self) -> str:
        """The script to run."""
        return self.arguments[0]


def _receive(connection: socket.socket) -> tuple[bytes, list[int]]:
    data, descriptors, _, _ = socket.recv_fds(connection, 1 << 16, 1, socket.MSG_CMSG_CLOEXEC)
    head = len(MAGIC) + 4
    length = head + int.from_bytes(data[len(MAGIC) : head], sys.byteorder)
    if data[: len(MAGIC)] != MAGIC or not head < length < MOST_BYTES:
        raise Refused(f"expected a request of {MAGIC!r} below {MOST_BYTES} bytes, found {data[:16]!r}")
    while len(data) < length:
        more = connection.recv(length - len(data))
        if not more:
            raise Refused("the request has no end")
        data += more
    return data[head:], descriptors


def _split(fields: list[bytes], counts: list[int]) -> list[list[bytes]]:
    if sum(counts) != len(fields):
        raise Refused(f"expected {sum(counts)} fields, found {len(fields)}")
    parts = []
    for count in counts:
        parts.append(fields[:count])
        fields = fields[count:]
    return parts


def _limits(text: str) -> dict[int, tuple[int, int]]:
    """Limits of a process by number, from ``/proc/<pid>/limits``."""
    found = {}
    for line in text.splitlines()[1:]:
        name = next((name for name in _LIMIT_NAMES if line.startswith(name)), None)
        number = getattr(resource, f"RLIMIT_{_LIMIT_NAMES[name]}", None) if name else None
        if name and number is not None:
            soft, hard = line[len(name) :].split()[:2]
            found[number] = (_limit(soft), _limit(hard))
    return found


def _limit(text: str) -> int:
    return resource.RLIM_INFINITY if text == "unlimited" else int(text)


def answer(connection: socket.socket, parent: Parent, tell_outdated: Callable[[], None]) -> Request:
    """In a fork: take the client's request and become its process. Ends this process if that is not to be.

    Parameters
    ----------
    tell_outdated:
        Called if no fork of this server is of use any more, before the client is told.
    """
    try:
        request = Request(connection)
    except (Refused, OSError, ValueError, IndexError):
        os._exit(0)  # the client sees it
    if request.kind == FACTS:
        with contextlib.suppress(OSError):
            connection.sendall(json.dumps(parent.facts()).encode())
        os._exit(0)
    try:
        _check(request, parent)
        streams = _tie(request.lifeline)
    except Refused as reason:
        if isinstance(reason, Changed):
            tell_outdated()
        with contextlib.suppress(OSError):
            request.lifeline.send(REFUSED + str(reason)[:2000].encode("utf-8", "replace"))
        os._exit(0)
    except OSError:
        os._exit(0)  # the client has gone
    with contextlib.suppress(OSError):
        connection.close()
        _become(request, parent, streams)
        return request
    os._exit(1)


def _check(request: Request, parent: Parent) -> None:
    """Raise `Refused` unless a fork can be the process."""
    if request.interpreter != sys.executable:
        raise Refused(f"its interpreter is {sys.executable}, expected {request.interpreter}")
    if (problem := difference(parent.environment, request.environment)) is not None:
        raise Refused(problem)
    ours = process_state()
    names = sorted({*ours, *request.state}.difference(_APPLIED))
    others = [name.decode() for name in names if ours.get(name) != request.state.get(name)]
    if others:
        raise Refused(f"its processes differ in {', '.join(others)}")
    named = paths_of(request.environment, request.directory)
    if (problem := parent.search_path.problem(named, parent.imported.top)) is not None:
        raise Refused(problem)
    if (path := parent.imported.changed()) is not None:
        raise Changed(f"{path} has changed since it was imported; it starts anew")
    _apply_limits(request.limits)


def _tie(lifeline: socket.socket) -> list[int]:
    """Say ``ready``, wait for ``go``, and have the kernel kill this process when the client's end closes.

    Returns the client's descriptors 0 to 2.

    A thread would need Python's lock, which native code may hold.
    """
    lifeline.setblocking(True)
    lifeline.sendall(READY + str(os.getpid()).encode())
    answer, streams, _, _ = socket.recv_fds(lifeline, len(GO), 3, socket.MSG_CMSG_CLOEXEC)
    if answer != GO or len(streams) != 3:
        os._exit(0)  # the client has gone another way
    try:
        fcntl.fcntl(lifeline, fcntl.F_SETOWN, os.getpid())
        fcntl.fcntl(lifeline, _F_SETSIG, signal.SIGKILL)
        fcntl.fcntl(lifeline, fcntl.F_SETFL, fcntl.fcntl(lifeline, fcntl.F_GETFL) | os.O_ASYNC)
    except OSError:
        pass  # the fork server, as long as it lives, does the same
    poll = select.poll()
    poll.register(lifeline, select.POLLRDHUP if hasattr(select, "POLLRDHUP") else select.POLLHUP)
    if poll.poll(0):
        os._exit(0)
    return streams


def _become(request: Request, parent: Parent, streams: list[int]) -> None:
    for number, descriptor in enumerate(streams):
        os.dup2(descriptor, number)
        os.close(descriptor)
    with contextlib.suppress(OSError):
        os.setpgid(0, 0)  # a signal for the client's group reaches this process through the client, and once
    os.chdir(request.directory)
    _apply_signals(request.state)
    os.environ.clear()
    os.environ.update(request.environment)
    named = paths_of(request.environment, request.directory)
    sys.argv = list(request.arguments)
    sys.orig_argv = [request.interpreter, *request.arguments]
    sys.path[:] = parent.search_path.of(os.path.realpath(request.script), named)
    for entry in sys.path:
        if sys.path_importer_cache.get(entry, "") is None:  # not a folder then; those of folders look at their times
            del sys.path_importer_cache[entry]
    parent.preload.apply_variables()
    sys.stdout.reconfigure(line_buffering=os.isatty(1))  # type: ignore[union-attr]
    count_age_from(request.client)
    with contextlib.suppress(AttributeError):
        threading.main_thread()._set_native_id()  # type: ignore[attr-defined]
    _draw_other_numbers()
    tempfile.tempdir = None  # from TMPDIR, when it is asked for
    if parent.openblas:
        give_openblas_its_threads(parent.openblas)
    for hook in parent.preload.after_fork:
        hook()


def _apply_limits(limits: Mapping[int, tuple[int, int]]) -> None:
    for number, wanted in limits.items():
        if resource.getrlimit(number) != wanted:
            try:
                resource.setrlimit(number, wanted)
            except (ValueError, OSError) as error:
                found = resource.getrlimit(number)
                raise Refused(f"its limit {number} is {found}, expected {wanted}: {error}") from None


def _apply_signals(state: Mapping[bytes, bytes]) -> None:
    """Ignore and block the signals that the client's process ignores and blocks."""
    ignored, blocked = (int(state.get(name, b"0"), 16) for name in _APPLIED)
    for number in signal.valid_signals():
        wanted = bool(ignored >> (number - 1) & 1)
        with contextlib.suppress(ValueError, OSError):  # not to be changed
            if wanted != (signal.getsignal(number) is signal.SIG_IGN):
                default = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
                signal.signal(number, signal.SIG_IGN if wanted else default)
    signal.pthread_sigmask(
        signal.SIG_SETMASK, {number for number in signal.valid_signals() if blocked >> (number - 1) & 1}
    )


def _draw_other_numbers() -> None:
    """What draws random numbers from the system when it is imported does so again, as every process has its own."""
    random.seed()
    modules: Mapping[str, Any] = sys.modules
    if "numpy.random" in modules:
        modules["numpy.random"].seed()
    if "torch" in modules:
        modules["torch"].default_generator.seed()


def run(request: Request) -> NoReturn:
    """Run the request's script as ``python script`` does, and end."""
    script = request.script
    module = types.ModuleType("__main__")
    loader = importlib.machinery.SourceFileLoader("__main__", script)
    names = {"__file__": script, "__builtins__": builtins, "__loader__": loader, "__cached__": None}
    module.__dict__.update(names, __annotations__={})
    sys.modules["__main__"] = module
    status = 1
    try:
        with open(script, "rb") as file:
            code = compile(file.read(), script, "exec")
        exec(code, module.__dict__)
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
        raise
    except BaseException as error:
        trace = error.__traceback__
        error.__traceback__ = trace.tb_next if trace else None  # without this frame
        sys.excepthook(type(error), error, error.__traceback__)
        if isinstance(error, KeyboardInterrupt):
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)
        sys.exit(1)
    finally:
        with contextlib.suppress(OSError):
            request.lifeline.send(END + str(status & 0xFF).encode())
    sys.exit(0)

"""The fork server: imports once, listens, forks, and tells each client how its process ended.

It has one thread at every fork. A fork reads the request itself, so that no client can keep the server. The processes
outlive it: each belongs to its client. While the server lives, it tells a client the exact status, and ends a process
whose client has gone, should the kernel not have done so.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import json
import os
import select
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any

from ts_handlers.fork_server.child import Parent, answer, run
from ts_handlers.fork_server.client import STATUS, peer
from ts_handlers.fork_server.environment import Imported, SearchPath
from ts_handlers.fork_server.preload import openblas_libraries
from ts_handlers.system.ownership import is_private_folder

BACKLOG = 128
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD)
"""Those that the server handles in another way than a new interpreter."""


@dataclasses.dataclass
class Options:
    """What a fork server is told at its start, as JSON.

    Attributes
    ----------
    socket:
        Where it listens, in a folder of this user that nobody else can enter.
    preload:
        The modules that it imports, in order.
    leash:
        A descriptor, or None: the server ends when its other end closes.
    folder:
        Removed with its files when the server ends, or None.
    ready:
        A descriptor, or None: closed when everything is imported.
    without:
        Modules that are left out, with the reason.
    listener:
        In a server that has started anew: the descriptor of its socket.
    """

    socket: str
    preload: list[str]
    leash: int | None = None
    folder: str | None = None
    ready: int | None = None
    without: dict[str, str] = dataclasses.field(default_factory=dict)
    listener: int | None = None


class Server:
    """Listens for clients of this user, and forks.

    Raises
    ------
    OSError
        It cannot listen there.
    PermissionError
        Others can enter the folder of the socket.
    """

    def __init__(self, options: Options, parent: Parent) -> None:
        self._options = options
        self._parent = parent
        self._listener = _listen(options)
        self._leash = options.leash
        self._woken, self._waker = os.pipe()
        self._outdated, self._outdate = os.pipe()
        self._children: dict[int, socket.socket] = {}
        self._epoll = select.epoll()
        self._pid = os.getpid()
        self._signals = {number: signal.getsignal(number) for number in _SIGNALS}
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for those that it serves

    def import_modules(self) -> None:
        """Import what is to be preloaded; starts anew without a module after which no fork is safe."""
        wanted = [name for name in self._options.preload if name not in self._options.without]
        found = self._parent.preload.import_modules(wanted)
        if found is not None:
            name, problem = found
            self._options.without[name] = problem
            self._start_anew(f"the module {name} is left out: {problem}")
        for name, reason in self._parent.preload.failed.items():
            say(f"the module {name} is left out: {reason}")
        self._parent.preload.failed.update(self._options.without)
        self._parent.openblas = openblas_libraries()
        self._parent.imported = Imported()
        gc.collect()
        gc.freeze()  # a collection in a fork would otherwise write to, and so copy, every page of torch's objects
        if self._options.ready is not None:
            os.close(self._options.ready)
            self._options.ready = None

    def serve(self) -> socket.socket:
        """Serve until the leash ends. In a fork, returns the connection to its client."""
        for number in self._own_descriptors():
            self._epoll.register(number, select.EPOLLIN)
        os.set_blocking(self._waker, False)
        signal.signal(signal.SIGCHLD, lambda *_: None)  # without a handler, Python does not write to the waker
        signal.set_wakeup_fd(self._waker, warn_on_full_buffer=False)
        signal.signal(signal.SIGTERM, self._on_sigterm)
        while True:
            descriptors = {descriptor for descriptor, _ in self._epoll.poll()}
            if self._outdated in descriptors:
                self._start_anew("a file of what it has imported has changed")
            # Clients that have gone first: the number of a closed descriptor is given to the next connection.
            for descriptor in descriptors.difference(self._own_descriptors()):
                self._client_has_gone(descriptor)
            if self._woken in descriptors:
                os.read(self._woken, 4096)
                self._report_the_ended()
            if self._leash in descriptors:
                self._end()
            if self._listener.fileno() in descriptors and (connection := self._accept()) is not None:
                return connection

    def _own_descriptors(self) -> list[int]:
        leash = [] if self._leash is None else [self._leash]
        return [self._listener.fileno(), self._woken, self._outdated, *leash]

    def leave(self) -> None:
        """In a fork: close what belongs to the server, and have signals as a new interpreter has them."""
        signal.set_wakeup_fd(-1)
        for number, handler in self._signals.items():
            signal.signal(number, handler)
        self._epoll.close()
        for descriptor in (*self._own_descriptors(), self._waker):
            os.close(descriptor)
        self._listener.detach()
        for each in self._children.values():
            each.close()

    def tell_outdated(self) -> None:
        """In a fork: have the server start anew."""
        os.write(self._outdate, b"!")

    def forget_outdated(self) -> None:
        """In a fork that is to be a client's process."""
        os.close(self._outdate)

    def _accept(self) -> socket.socket | None:
        try:
            connection, _ = self._listener.accept()
        except OSError as error:
            say(f"no connection could be accepted: {error}")
            time.sleep(0.1)  # no descriptors are left, and the next attempt would follow at once
            return None
        user = peer(connection)[1]
        if (reason := refusal(user)) is not None:
            say(reason)
            connection.close()
            return None
        try:
            child = os.fork()
        except OSError as error:
            say(f"no process could be made: {error}")
            connection.close()
            return None
        if child == 0:
            self.leave()
            return connection
        self._children[child] = connection
        self._epoll.register(connection, select.EPOLLRDHUP)
        return None

    def _report_the_ended(self) -> None:
        with contextlib.suppress(ChildProcessError):
            while True:
                child, status = os.waitpid(-1, os.WNOHANG)
                if child == 0:
                    return
                connection = self._children.pop(child, None)
                if connection is not None:
                    self._forget(connection)
                    with contextlib.suppress(OSError):
                        connection.send(STATUS + str(os.waitstatus_to_exitcode(status)).encode())
                    connection.close()

    def _client_has_gone(self, number: int) -> None:
        for child, connection in self._children.items():
            if connection.fileno() == number:
                os.kill(child, signal.SIGKILL)  # not reaped yet, so the number is its own
                self._forget(connection)

    def _forget(self, connection: socket.socket) -> None:
        with contextlib.suppress(OSError):  # forgotten before
            self._epoll.unregister(connection)

    def _start_anew(self, reason: str) -> None:
        """Replace this process by a new server on the same socket; clients that wait there go on waiting."""
        say(f"it starts anew: {reason}")
        options = dataclasses.replace(self._options, listener=os.dup(self._listener.fileno()))
        for descriptor in (options.listener, options.leash, options.ready):
            if descriptor is not None:
                os.set_inheritable(descriptor, True)
        signal.set_wakeup_fd(-1)
        for number, handler in self._signals.items():
            signal.signal(number, signal.SIG_IGN if handler is signal.SIG_IGN else signal.SIG_DFL)
        os.chdir(self._parent.directory)
        os.environ.clear()
        os.environ.update(self._parent.environment)
        command = command_line(options)
        os.execv(command[0], command)

    def _on_sigterm(self, *_: Any) -> None:
        if os.getpid() == self._pid:
            self._end()
        os._exit(128 + signal.SIGTERM)  # a fork that has not left yet

    def _end(self) -> None:
        if (folder := self._options.folder) is not None:
            for name in os.listdir(folder):
                with contextlib.suppress(OSError):
                    os.unlink(os.path.join(folder, name))
            with contextlib.suppress(OSError):
                os.rmdir(folder)
        else:
            with contextlib.suppress(OSError):
                os.unlink(self._options.socket)
        os._exit(0)


def refusal(user: int) -> str | None:
    """Why a user's client is refused, or None.

    Examples
    --------
    >>> refusal(os.geteuid())
    >>> refusal(os.geteuid() + 1).startswith("a connection of the user")
    True
    """
    ours = os.geteuid()
    return None if user == ours else f"a connection of the user {user} is refused, expected {ours}"


def _listen(options: Options) -> socket.socket:
    if options.listener is not None:
        os.set_inheritable(options.listener, False)
        taken = socket.socket(fileno=options.listener)
        taken.listen(BACKLOG)
        options.listener = None
        return taken
    folder = os.path.dirname(os.path.abspath(options.socket))
    status = os.lstat(folder)
    if not is_private_folder(Path(folder)) or status.st_mode & 0o077:
        raise PermissionError(f"{folder} must be a folder of this user with mode 0700, found {status.st_mode:o}")
    with contextlib.suppress(FileNotFoundError):
        os.unlink(options.socket)  # of one that has died: whoever starts a server sees to it that there is one
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(options.socket)
    listener.listen(BACKLOG)
    return listener


def say(text: str) -> None:
    """Tell whoever reads the fork server's log."""
    print(f"ts_handlers fork server: {text}", file=sys.stderr, flush=True)


def command_line(options: Options) -> list[str]:
    """The command that starts a fork server. It looks for modules where any script of this interpreter does."""
    code = "import sys; sys.path[0] or sys.path.pop(0); from ts_handlers.fork_server.server import main; main()"
    return [sys.executable, "-c", code, json.dumps(dataclasses.asdict(options))]


def main() -> None:
    """Run a fork server with the options in ``sys.argv[1]``. In a fork it runs the client's script, and ends."""
    options = Options(**json.loads(sys.argv[1]))
    environment = dict(os.environ)
    for number in (options.leash, options.ready):
        if number is not None:
            os.set_inheritable(number, False)
    parent = Parent(environment, SearchPath(environment, os.getcwd()))
    server = Server(options, parent)
    server.import_modules()
    connection = server.serve()
    request = answer(connection, parent, server.tell_outdated)
    server.forget_outdated()
    run(request)

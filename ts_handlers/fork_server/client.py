"""Stands in an interpreter's place: asks the fork server for a process, and is its end for whoever has started it.

It runs with ``-I -S`` and imports only modules that are built in or hold C code, which takes 10 ms instead of 20.

A client sends what the process is to be, and one end of a pair of sockets, the *lifeline*. A fork answers ``ready``,
waits for the client's ``go``, which brings the descriptors 0 to 2, and from then on is killed by the kernel when the
client's end closes, however the client ends. What goes wrong before ``go`` makes the client the interpreter itself, by
exec. Sent with the request, the descriptors would be held open by a fork server that hangs.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]
import _socket
import posix
import select
import sys
import time

MAGIC = b"TSF1"
RUN, FACTS = b"run", b"facts"
READY, REFUSED, GO, END = b"ready ", b"refused ", b"go", b"end "
STATUS = b"status "
LONGEST_SECONDS = 60.0
"""How long a client waits for its process, while the fork server works."""
IDLE_SECONDS = 3.0
"""How long it waits for a fork server that uses no processor: one that is stopped, or hangs."""
STATUS_SECONDS = 5.0
"""How long after a process's end the fork server may take to tell its status."""
UNKNOWN = 128 + 9
"""The exit code of a process that did not say how it ends, when the fork server cannot tell it either."""
_PASSED_ON = (_signal.SIGTERM, _signal.SIGINT, _signal.SIGHUP, _signal.SIGQUIT, _signal.SIGUSR1, _signal.SIGUSR2)
_STATE = (
    *(b"Umask", b"Uid", b"Gid", b"Groups", b"CapInh", b"CapPrm", b"CapEff", b"CapBnd", b"CapAmb"),
    *(b"NoNewPrivs", b"Seccomp", b"Cpus_allowed", b"Mems_allowed", b"SigBlk", b"SigIgn"),
)
_PEERCRED = getattr(_socket, "SO_PEERCRED", 17)


class Unavailable(Exception):
    """There is no process from the fork server; the message says why."""


def main(path: str, interpreter: str, script: str) -> None:
    """Run the command line ``sys.argv[1:]`` of an interpreter: in a process of the fork server, or here, by exec.

    Parameters
    ----------
    path:
        The fork server's socket.
    interpreter:
        What this stands in the place of; it runs everything that the fork server does not.
    script:
        The end of the path of the script that the fork server runs. Other command lines are not for it.
    """
    arguments = sys.argv[1:]
    if is_for_fork_server(arguments, script):
        try:
            process = Process(path, interpreter, arguments)
        except (OSError, Unavailable) as error:
            text = f"ts_handlers: this process starts without the fork server: {error}\n"
            posix.write(2, text.encode("utf-8", "backslashreplace"))
        else:
            process.follow()
    posix.execve(interpreter, [interpreter, *arguments], posix.environ)


def is_for_fork_server(arguments: list[str], script: str) -> bool:
    """Whether a command line is that of the script, without an option of the interpreter.

    Examples
    --------
    >>> is_for_fork_server(["/opt/ts/worker.py", "--port", "1"], "/ts/worker.py")
    True
    >>> is_for_fork_server(["-m", "venv", "/opt/ts/worker.py"], "/ts/worker.py")
    False
    """
    return bool(arguments) and arguments[0].startswith("/") and arguments[0].endswith(script)


class Process:
    """A process of the fork server, seen from the client that it belongs to.

    Raises
    ------
    Unavailable, OSError
        There is none, and there will be none.
    """

    def __init__(self, path: str, interpreter: str, arguments: list[str]) -> None:
        self._control = connect(path)
        self._lifeline, theirs = _socket.socketpair(_socket.AF_UNIX, _socket.SOCK_STREAM)
        try:
            send_request(self._control, run_request(interpreter, arguments), theirs.fileno())
        finally:
            theirs.close()
        self._wait_until_ready()
        self._lifeline.sendmsg([GO], [_rights(0, 1, 2)])

    def _wait_until_ready(self) -> None:
        """Until the fork is there; raises `Unavailable` if it says no, or if the fork server does nothing."""
        server = peer(self._control)[0]
        poll = select.poll()
        poll.register(self._lifeline, select.POLLIN)
        began = seen = time.monotonic()
        work = work_of(server)
        while not poll.poll(100):
            now = time.monotonic()
            if (done := work_of(server)) != work:
                work, seen = done, now
            if now - seen > IDLE_SECONDS:
                raise Unavailable(f"it has done nothing for {IDLE_SECONDS:g} s, as process {server}")
            if now - began > LONGEST_SECONDS:
                raise Unavailable(f"it has not answered for {LONGEST_SECONDS:g} s, as process {server}")
        answer = self._lifeline.recv(4096)
        if answer.startswith(REFUSED):
            raise Unavailable(answer[len(REFUSED) :].decode("utf-8", "replace"))
        if not answer.startswith(READY):
            raise Unavailable("it made no process")
        self._pid = int(answer[len(READY) :])

    def follow(self) -> None:
        """Pass signals on, wait for the end of the process, and end as it did; does not return."""
        process = _open_process(self._pid)
        for number in _PASSED_ON:
            if _signal.getsignal(number) is not _signal.SIG_IGN:
                _signal.signal(number, lambda got, _: _pass_on(process, self._pid, got))
        null = posix.open("/dev/null", posix.O_RDWR)
        for number in (0, 1, 2):  # whose other ends wait for the process's end
            posix.dup2(null, number)
        status = self._wait_for_status(process)
        if status < 0:  # of a signal: end by the same one, without a second core file
            _no_core_file()
            if -status != _signal.SIGKILL:
                _signal.signal(-status, _signal.SIG_DFL)
            posix.kill(posix.getpid(), -status)
            status = 128 - status
        posix._exit(status & 0xFF)

    def _wait_for_status(self, process: int) -> int:
        told, server_lives = UNKNOWN, True
        limit: float | None = None
        poll = select.poll()
        poll.register(self._control, select.POLLIN)
        poll.register(process if process >= 0 else self._lifeline, select.POLLIN)
        if process >= 0:
            poll.register(self._lifeline, select.POLLIN)
        while limit is None or (server_lives and time.monotonic() < limit):
            for number, _ in poll.poll(None if limit is None else 100):
                if number == self._control.fileno():
                    answer = self._control.recv(64)
                    if answer.startswith(STATUS):
                        return int(answer[len(STATUS) :])
                    server_lives = False  # its processes go on
                elif number == self._lifeline.fileno() and (answer := self._lifeline.recv(64)):
                    told = int(answer[len(END) :])
                    continue
                elif number == process or process < 0:
                    limit = time.monotonic() + STATUS_SECONDS
                poll.unregister(number)
        return told


def connect(path: str) -> _socket.socket:
    """A connection to the fork server of this user that listens at `path`.

    Raises
    ------
    Unavailable, OSError
        Nobody listens there, or it is another user's.
    """
    connection = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM)
    connection.settimeout(IDLE_SECONDS)
    try:
        connection.connect(path)
    except OSError as error:
        raise Unavailable(f"nobody listens at {path}: {error.strerror or error}") from None
    user = peer(connection)[1]
    if user != posix.geteuid():
        raise Unavailable(f"{path} is that of the user {user}, expected {posix.geteuid()}")
    return connection


def peer(connection: _socket.socket) -> tuple[int, int]:
    """Process id and user id of the other side of a Unix socket, as the kernel knows them."""
    raw = connection.getsockopt(_socket.SOL_SOCKET, _PEERCRED, 12)
    return int.from_bytes(raw[:4], sys.byteorder, signed=True), int.from_bytes(raw[4:8], sys.byteorder)


def work_of(pid: int) -> bytes:
    """What changes while a process works: its processor time and its page faults."""
    fields = _read(f"/proc/{pid}/stat").rpartition(b")")[2].split()
    return b" ".join([*fields[7:13], fields[39]]) if len(fields) > 39 else b""


def run_request(interpreter: str, arguments: list[str]) -> list[bytes]:
    """The fields of the request for a process that runs ``interpreter`` with these arguments, here and now."""
    encoding = sys.getfilesystemencoding()
    words = [each.encode(encoding, "surrogateescape") for each in (interpreter, *arguments)]
    variables = [name + b"=" + value for name, value in posix.environ.items()]
    state = [name + b"=" + value for name, value in process_state().items()]
    head = [RUN, b"%d" % posix.getpid(), posix.getcwdb(), _read("/proc/self/limits")]
    counts = [b"%d" % len(each) for each in (words, variables, state)]
    return [*head, *counts, *words, *variables, *state]


def process_state() -> dict[bytes, bytes]:
    """What a child has from its parent beside environment, working directory, descriptors and limits."""
    state = {}
    for line in _read("/proc/self/status").split(b"\n"):
        name, _, value = line.partition(b":")
        if name in _STATE:
            state[name] = value.strip()
    for namespace in sorted(posix.listdir("/proc/self/ns")):
        state[b"namespace " + namespace.encode()] = _link(f"/proc/self/ns/{namespace}")
    state[b"root"] = _link("/proc/self/root")
    state[b"security label"] = _read("/proc/self/attr/current").strip(b"\0\n ")
    state[b"oom_score_adj"] = _read("/proc/self/oom_score_adj").strip()
    state[b"nice"] = b"%d" % posix.getpriority(posix.PRIO_PROCESS, 0)
    state[b"scheduler"] = b"%d" % posix.sched_getscheduler(0)
    return state


def send_request(connection: _socket.socket, fields: list[bytes], lifeline: int) -> None:
    """Send a request: magic, length, and fields with a zero byte between them; the lifeline with its first byte."""
    body = b"\0".join(fields)
    data = MAGIC + len(body).to_bytes(4, sys.byteorder) + body
    sent = connection.sendmsg([data], [_rights(lifeline)])
    if sent < len(data):  # else the fork may have answered and gone by now, and nothing can be sent, not even nothing
        connection.sendall(data[sent:])


def _rights(*descriptors: int) -> tuple[int, int, bytes]:
    packed = b"".join(each.to_bytes(4, sys.byteorder) for each in descriptors)
    return _socket.SOL_SOCKET, _socket.SCM_RIGHTS, packed


def _open_process(pid: int) -> int:
    try:
        return posix.pidfd_open(pid)
    except (AttributeError, OSError):  # an old kernel, or it has ended by now
        return -1


def _pass_on(process: int, pid: int, number: int) -> None:
    try:
        if process >= 0:
            _signal.pidfd_send_signal(process, number)
        else:
            posix.kill(pid, number)
    except OSError:
        pass  # it has ended by now


def _no_core_file() -> None:
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    except (ImportError, ValueError, OSError):
        pass


def _link(path: str) -> bytes:
    try:
        return posix.readlink(path).encode()
    except OSError:
        return b""


def _read(path: str) -> bytes:
    try:
        number = posix.open(path, posix.O_RDONLY | posix.O_CLOEXEC)
    except OSError:
        return b""
    try:
        parts = []
        while part := posix.read(number, 65536):
            parts.append(part)
        return b"".join(parts)
    except OSError:
        return b""
    finally:
        posix.close(number)

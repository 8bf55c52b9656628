"""Start a process with everything it will ever start, and end all of it again.

TorchServe is a tree: a Python launcher, a JVM, one Python process per worker and whatever compilers those
run. The tree gets a session of its own, so that Ctrl-C in a terminal reaches only the caller, who then ends
it in order. Three things end it: `ProcessTree.stop`, the interpreter's exit, and, when the caller is killed
outright, a watchdog shell that sees its standard input close.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import subprocess
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path

_MARK = "TS_HANDLERS_PROCESS_TREE"
"""Environment variable inherited by the whole tree; finds descendants that opened a session of their own."""

_HAS_PROC = Path("/proc/self/stat").exists()

# dash, the /bin/sh of Debian, takes a negative number only after `-s NAME --`.
_WATCHDOG = 'read -r line || { kill -s TERM -- "-$1"; sleep 5; kill -s KILL -- "-$1"; }'


class ProcessTree:
    """A process in its own session, with its descendants.

    Parameters
    ----------
    command:
        Program and arguments.
    env:
        The complete environment of the process.
    directory:
        Working directory.
    output:
        File that receives standard output and standard error; overwritten.
    """

    def __init__(self, command: Sequence[str], env: Mapping[str, str], directory: Path, output: Path) -> None:
        self._mark = uuid.uuid4().hex
        self._stopped = False
        with output.open("wb") as stream:
            self._process = subprocess.Popen(
                list(command),
                env={**env, _MARK: self._mark},
                cwd=directory,
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        atexit.register(self.stop, 2.0)
        try:
            self._watchdog = subprocess.Popen(
                ["/bin/sh", "-c", _WATCHDOG, "watchdog", str(self.pid)],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
        except BaseException:
            self._signal(signal.SIGKILL)
            raise

    @property
    def pid(self) -> int:
        """Process id of the first process, which is also the id of its group and session."""
        return self._process.pid

    def returncode(self) -> int | None:
        """Exit status of the first process, or None while it runs."""
        return self._process.poll()

    def members(self) -> list[int]:
        """Process ids of the tree that are alive; zombies do not count. Empty where there is no /proc."""
        return [pid for pid in _process_ids() if self._belongs(pid)]

    def stop(self, timeout: float = 15.0) -> None:
        """End the tree: SIGTERM, then SIGKILL after `timeout` seconds. May be called again."""
        if self._stopped:
            return
        self._signal(signal.SIGTERM)
        try:
            self._wait_gone(timeout)
        finally:
            self._signal(signal.SIGKILL)
            self._wait_gone(5.0)
            with contextlib.suppress(OSError):
                # A line tells the watchdog that there is nothing left to end.
                if self._watchdog.stdin is not None and not self._watchdog.stdin.closed:
                    self._watchdog.stdin.write(b"\n")
                    self._watchdog.stdin.close()
            self._watchdog.wait()
            self._stopped = True
            atexit.unregister(self.stop)

    def _belongs(self, pid: int) -> bool:
        try:
            # The command name may contain anything, so fields are counted from the last parenthesis
            # (proc(5)).
            fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
            if fields[0] in (b"Z", b"X"):
                return False
            if int(fields[3]) == self.pid:
                return True
            return f"{_MARK}={self._mark}".encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        except (OSError, IndexError):
            return False

    def _signal(self, number: signal.Signals) -> None:
        members = self.members()
        # The first process is reaped only after the last use of its id: until then the id cannot name
        # another group.
        if members or self._process.returncode is None or not _HAS_PROC:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pid, number)
        for pid in members:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, number)

    def _wait_gone(self, timeout: float) -> None:
        deadline = time.monotonic() + timeout
        while (self._process.poll() is None or self.members()) and time.monotonic() < deadline:
            time.sleep(0.02)


def _process_ids() -> list[int]:
    try:
        return [int(name) for name in os.listdir("/proc") if name.isdigit()]
    except OSError:
        return []

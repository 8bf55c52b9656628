"""The worker's side of the model's process: find it, or start it; `__main__` is the process's side.

The process gets its specification as `ts_handlers.system.child_process` says. Its standard input stays open until the
worker that started it has found it. It inherits the descriptor of the folder's lock, which it holds until it ends. It
writes to the worker's own standard output and standard error, and so into the server's log.
"""

from __future__ import annotations

import contextlib
import logging
import os
import subprocess
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ts_handlers import errors
from ts_handlers.errors import ModelError, WarmStartError
from ts_handlers.model_process.folder import Holder, folder_of, sweep, write_holder
from ts_handlers.model_process.watch import LOOK_SECONDS, Watch
from ts_handlers.model_process.wire import Connection, ConnectionLost, Hello, ModelDescription
from ts_handlers.settings.sections import ContextSettings
from ts_handlers.system.child_process import how_it_ended, start_child
from ts_handlers.system.processes import parent_of, process_start

logger = logging.getLogger(__name__)

POLL_SECONDS = 0.02
LOG_SECONDS = 10.0
GREETING_SECONDS = 10.0
CALL_MARGIN_SECONDS = 60.0
CLOCK_SECONDS = 0.02
"""By how much a file's time may lag behind the clock."""
CPU_LAUNCHER = b"torch.backends.xeon.run_cpu"
STARTS = 8
"""Processes that a worker starts one after the other when they die at their start: the crash guard quarantines what
each of them has died of, and the fallback order of backends ends at eager."""


class LaunchError(WarmStartError, RuntimeError):
    """The process that holds the model cannot be started, or dies each time it starts."""


class Launcher:
    """Finds or starts one model's process, for one worker.

    Parameters
    ----------
    name:
        The model's name, for the log.
    spec:
        What the process starts from, JSON-compatible; workers with equal ones share it.
    contexts:
        How long the process may keep silent, and how long a call may take.

    Attributes
    ----------
    folder:
        The process's.
    watch:
        Sees whether the process is alive.
    """

    def __init__(self, name: str, spec: Mapping[str, Any], contexts: ContextSettings) -> None:
        self._name = name
        self._spec = dict(spec)
        self._contexts = contexts
        self.folder = folder_of(spec)
        self.watch = Watch(self.folder, contexts.silent_seconds)

    def join(self, deadline: float | None = None) -> tuple[Connection, ModelDescription]:
        """A connection that stands for this worker, and what the process says of its model; starts it if need be.

        Parameters
        ----------
        deadline:
            Of `time.monotonic`; None waits for as long as some process starts.

        Raises
        ------
        WarmStartError
            What the start failed with.
        LaunchError
            The process cannot be started, or has died too often.
        TimeoutError
            The deadline has passed; a process that is starting goes on.
        """
        began, next_log, starts = time.time(), time.monotonic() + LOG_SECONDS, 0
        started: subprocess.Popen[bytes] | None = None
        try:
            while True:
                joined = self._greet()
                if joined is not None:
                    return joined
                lock = self.folder.take_lock()
                if lock is not None:
                    try:
                        self._raise_failure(began - CLOCK_SECONDS)
                        if starts == STARTS:
                            raise LaunchError(
                                f"{self._name}: the model's process has died {starts} times while it started, last "
                                f"{_end_of(started)}; its own messages stand above in this log"
                            )
                        starts += 1
                        _forget(started)
                        started = self._start(lock)
                    finally:
                        os.close(lock)
                elif self.watch.is_silent():
                    self.watch.end()
                now = time.monotonic()
                if deadline is not None and now >= deadline:
                    raise TimeoutError
                if now >= next_log:
                    next_log = now + LOG_SECONDS
                    self._log_progress(time.time() - began)
                time.sleep(POLL_SECONDS)
        finally:
            _forget(started)

    def connect(self) -> Connection:
        """A connection for calls.

        Raises
        ------
        ConnectionLost
            Nothing serves now.
        """
        channel = self.folder.connect()
        if channel is None:
            raise ConnectionLost("no process serves the model")
        connection = Connection(channel)
        # A call waits for a context, and for the calls that are retried one by one, before it runs.
        connection.limit(self._contexts.call_seconds + self._contexts.wait_seconds + CALL_MARGIN_SECONDS)
        connection.send(Hello(os.getpid()))
        return connection

    def _greet(self) -> tuple[Connection, ModelDescription] | None:
        channel = self.folder.connect()
        if channel is None:
            return None
        connection = Connection(channel)
        try:
            connection.send(Hello(os.getpid(), worker=True), (1, 2))
            deadline = time.monotonic() + GREETING_SECONDS
            while not connection.has_message(LOOK_SECONDS):
                if self.watch.is_silent():
                    self.watch.end()
                    raise ConnectionLost("it gave no sign of life")
                if time.monotonic() >= deadline:
                    raise ConnectionLost("it has not answered a greeting in time")
            message, _ = connection.receive()
            connection.limit(0)
            if isinstance(message, ModelDescription):
                return connection, message
        except ConnectionLost:  # it ends just now, or another attempt is made
            pass
        connection.close()
        return None

    def _raise_failure(self, since: float) -> None:
        """Raise what another worker's process failed with while this one waited for it."""
        status = self.folder.read_status()
        if status is None or status.error is None or self.folder.status_time() < since:
            return
        kind = getattr(errors, status.error.type, None)
        if isinstance(kind, type) and issubclass(kind, WarmStartError):
            raise kind(status.error.message)
        raise ModelError(f"{self._name}: the model's process failed: {status.error.type}: {status.error.message}")

    def _start(self, lock: int) -> subprocess.Popen[bytes]:
        sweep()
        self.folder.forget_status()
        self.folder.stop_listening()
        spec = {**self._spec, "folder": str(self.folder.path), "lock": lock}
        try:
            process = start_child("ts_handlers.model_process.__main__", spec, close_input=False, pass_fds=(lock,))
        except OSError as error:
            raise LaunchError(f"{self._name}: the model's process cannot be started: {error}") from error
        holder = Holder(process.pid, process_start(process.pid))
        write_holder(lock, holder)
        reap = threading.Thread(target=self._reap, args=(process, holder), daemon=True, name="ts_handlers-reap")
        reap.start()
        return process

    def _reap(self, process: subprocess.Popen[bytes], holder: Holder) -> None:
        code = process.wait()
        self.folder.write_ended(holder, code)
        if code:
            logger.warning("%s: the model's process %d %s", self._name, process.pid, how_it_ended(code))

    def _log_progress(self, seconds: float) -> None:
        status = self.folder.read_status()
        if status is None:
            logger.info("%s: waiting for the model's process since %.0f s", self._name, seconds)
            return
        logger.info(
            "%s: waiting for the model's process %d since %.0f s; it is at: %s%s",
            *(self._name, status.pid, seconds, status.phase),
            "" if status.estimate is None else f" (the latest build took {status.estimate:.0f} s)",
        )


def _end_of(process: subprocess.Popen[bytes] | None) -> str:
    return "in another worker's hands" if process is None else how_it_ended(process.wait())


def _forget(process: subprocess.Popen[bytes] | None) -> None:
    """Close the pipe by which a process knows that the worker that started it still waits for it."""
    if process is not None and process.stdin is not None:
        with contextlib.suppress(OSError):
            process.stdin.close()


def parent_identity() -> list[int]:
    """The server's process and its `process_start`: workers of one server share them.

    That is the worker's parent, or with TorchServe's `cpu_launcher_enable` the parent of torch's launcher: each worker
    has one.
    """
    parent = os.getppid()
    while CPU_LAUNCHER in _command(parent):
        parent = parent_of(parent)
    return [parent, process_start(parent)]


def _command(pid: int) -> list[bytes]:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return []

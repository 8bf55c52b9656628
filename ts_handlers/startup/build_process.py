"""A child process that builds artifacts into the store: the parent's side; `build_child` is the child's.

The child gets a specification (`ts_handlers.system.child_process`) and answers with JSON lines on its standard output:
``{"phase": ..., "estimate": ...}`` when a phase begins, and at the end ``{"result": {...}}`` or ``{"error": ...}``.
What it prints otherwise goes to this process's log, line by line. It runs in a process group of its own, which is ended
as a whole: compilers that it started go with it.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from ts_handlers.errors import BuildError
from ts_handlers.settings.sections import BackgroundSettings
from ts_handlers.system.child_process import TERM_SECONDS, how_it_ended, start_child

logger = logging.getLogger(__name__)

EXIT_SECONDS = 30.0

OnPhase = Callable[[str, "float | None"], None]


class BuildProcess:
    """One child process; see `ts_handlers.startup.build_child` for its specification.

    Parameters
    ----------
    name:
        The model's name, for the log.
    spec:
        What to build.
    limits:
        Niceness, compile threads, memory and time of the child.
    on_phase:
        Called with a phase's name and the seconds that the build is expected to take (None when unknown).

    Raises
    ------
    BuildError
        The process cannot be started.
    """

    def __init__(self, name: str, spec: dict[str, Any], limits: BackgroundSettings, on_phase: OnPhase) -> None:
        self._name = name
        self._limits = limits
        self._on_phase = on_phase
        self._ended_by: str | None = None
        self._lock = threading.Lock()
        self._reaped = False
        spec = {
            **spec,
            "parent": os.getpid(),
            "directory": os.getcwd(),
            "nice": limits.nice,
            "memory_mb": limits.memory_mb,
        }
        try:
            self._process = start_child(
                "ts_handlers.startup.build_child",
                spec,  # the child goes to `directory` once it has imported what it needs
                search=spec.get("search", ()),
                variables=_bounds_of_compiler(limits),
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
            )
        except OSError as error:
            raise BuildError(f"the build process cannot be started: {error}") from error

    @property
    def pid(self) -> int:
        """Process id of the child."""
        return self._process.pid

    def run(self) -> dict[str, Any]:
        """Wait for the end and return the child's result.

        Raises
        ------
        BuildError
            The build failed, was killed or took too long.
        """
        log = threading.Thread(target=self._forward_log, daemon=True, name="ts_handlers-build-log")
        log.start()
        seconds = self._limits.seconds
        with self._limit(seconds, f"it took longer than the setting background.seconds: {seconds}"):
            answer = self._read_answer()
        with self._limit(EXIT_SECONDS, "it did not exit"):
            os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT)
        self.end("")  # a compiler may outlive the child; until the child is reaped its group's id is nobody else's
        with self._lock:
            code = self._process.wait()
            self._reaped = True
        log.join(1.0)
        if answer is None:
            how = how_it_ended(code) + (" and no result" if code >= 0 else "")
            how += f": {self._ended_by}" if self._ended_by else ""
            raise BuildError(f"the build process {how}")
        if "result" not in answer:
            raise BuildError(str(answer["error"]))
        result: dict[str, Any] = answer["result"]
        return result

    def end(self, reason: str) -> None:
        """End the child and what it started; does nothing when it has been waited for.

        SIGTERM comes first, and by that the crash guard knows that nothing was wrong with what it did.
        """
        with self._lock:
            if self._reaped:
                return
            self._ended_by = self._ended_by or reason
            deadline = time.monotonic() + TERM_SECONDS
            self._signal(signal.SIGTERM)
            while time.monotonic() < deadline and not self._has_ended():
                time.sleep(0.01)
            self._signal(signal.SIGKILL)

    def _signal(self, number: signal.Signals) -> None:
        try:
            os.killpg(self.pid, number)
        except OSError:  # it has not made its group yet
            os.kill(self.pid, number)

    def _has_ended(self) -> bool:
        return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is not None

    @contextlib.contextmanager
    def _limit(self, seconds: float | None, reason: str) -> Iterator[None]:
        """End the child when the block takes longer."""
        if seconds is None:
            yield
            return
        timer = threading.Timer(seconds, self.end, [reason])
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def _read_answer(self) -> dict[str, Any] | None:
        """Pass phases on until the result or error comes; None when the child says neither."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            try:
                message = json.loads(line)
            except ValueError:
                continue
            if "phase" not in message:
                return dict(message)
            self._on_phase(message["phase"], message.get("estimate"))
        return None

    def _forward_log(self) -> None:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            text = line.decode("utf-8", "replace").rstrip()
            if text:
                logger.info("build of %s: %s", self._name, text)


def _bounds_of_compiler(limits: BackgroundSettings) -> dict[str, str]:
    """The environment variables that bound the child's compiler."""
    threads = limits.compile_threads or max(1, len(os.sched_getaffinity(0)) // 2)
    return {
        "TORCHINDUCTOR_COMPILE_THREADS": str(threads),
        "OMP_WAIT_POLICY": "PASSIVE",  # idle threads of the child sleep instead of spinning on a serving processor
    }

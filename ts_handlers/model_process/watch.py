"""Signs of life of the model's process, and its end when it gives none.

A call that keeps the interpreter's lock, and whoever stops the process (SIGSTOP, a frozen control group), keep every
thread in it from running, so only somebody outside can judge it: each worker does. While its interpreter runs, the
process touches the lock that it holds, once a second. A worker that sees no touch for too long ends the process, if it
is the one that the lock names, and this user's. What the worker itself slept through does not count.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time

from ts_handlers.model_process.folder import Folder, Holder
from ts_handlers.system.processes import end_process, is_stopped, process_start

logger = logging.getLogger(__name__)

BEAT_SECONDS = 1.0
LOOK_SECONDS = 1.0
START_SILENT_SECONDS = 600.0
"""How long a process that starts may keep silent: libraries load, and code compiles, with the interpreter's lock."""
END_SECONDS = 10.0
"""How long a process may take to end by SIGKILL; afterwards, as in a driver that hangs, it is left alone."""


def start_beating(lock: int) -> None:
    """In the model's process: touch its lock, whose descriptor this is, for as long as the interpreter runs."""

    def beat() -> None:
        while True:
            with contextlib.suppress(OSError):
                os.utime(lock)
            time.sleep(BEAT_SECONDS)

    threading.Thread(target=beat, daemon=True, name="ts_handlers-beat").start()


class Watch:
    """For how long the process that holds a folder's lock has kept silent, as far as this worker was awake.

    Parameters
    ----------
    folder:
        The process's.
    silent_seconds:
        How long a process that serves, or is stopped, may keep silent.
    """

    def __init__(self, folder: Folder, silent_seconds: float) -> None:
        self._folder = folder
        self._silent_seconds = silent_seconds
        self._sign: tuple[Holder, int] | None = None
        self._silent, self._looked = 0.0, time.monotonic()

    def is_silent(self) -> bool:
        """Look; whether the process has kept silent for too long."""
        now = time.monotonic()
        sign = self._folder.sign()
        if sign is None or sign != self._sign:
            self._sign, self._silent = sign, 0.0
        else:
            self._silent += min(now - self._looked, 2 * LOOK_SECONDS)
        self._looked = now
        if self._sign is None or self._silent <= self._silent_seconds:
            return False
        status = self._folder.read_status()
        serves = status is not None and status.pid == self._sign[0].pid and status.phase == "serving"
        return serves or is_stopped(self._sign[0].pid) or self._silent > START_SILENT_SECONDS

    def end(self) -> None:
        """End the process, and wait until it has ended or is given up."""
        if self._sign is None:
            return
        holder = self._sign[0]
        stopped = is_stopped(holder.pid)
        if process_start(holder.pid) == holder.start and self._folder.killed(holder) is None:
            self._folder.write_killed(holder, "stopped" if stopped else "silent")  # before others see it dead
        if not end_process(holder.pid, holder.start):
            return  # it has ended by itself, or by another worker
        why = "somebody has stopped it" if stopped else "its code keeps the interpreter's lock"
        logger.error(
            "the model's process %d has given no sign of life for %.0f s: %s; it was ended, and another one is started",
            *(holder.pid, self._silent, why),
        )
        self._silent = 0.0
        deadline = time.monotonic() + END_SECONDS
        while time.monotonic() < deadline:
            if self._folder.is_free():
                return
            time.sleep(0.02)
        logger.error("the model's process %d does not end; it is left alone, and another one is started", holder.pid)
        self._folder.give_up(holder)

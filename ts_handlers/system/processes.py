"""What the kernel tells of this boot and of its processes."""

from __future__ import annotations

import os
import signal
from pathlib import Path

_asked_for_at = 0
"""When the process started in whose place this one is, in clock ticks; 0: this one."""


def boot_id() -> str:
    """The kernel's boot id, which tells whether the machine was started again; empty where there is none."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def parent_of(pid: int) -> int:
    """The parent of a process. Raises `OSError` when there is no such process."""
    return int(_stat(pid)[1])


def process_start(pid: int) -> int:
    """When a process started, in clock ticks since the boot; 0 when there is none.

    A number and a start together name a process: numbers are used again.
    """
    try:
        return int(_stat(pid)[19])
    except (OSError, ValueError, IndexError):
        return 0


def is_stopped(pid: int) -> bool:
    """Whether somebody has stopped a process, by a signal, in a debugger, or with its whole control group."""
    try:
        if _stat(pid)[0] in (b"T", b"t"):
            return True
        for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines():
            number, _, path = line.split(":", 2)
            if number == "0":  # version 2
                return "frozen 1" in Path(f"/sys/fs/cgroup{path}/cgroup.events").read_text().splitlines()
    except (OSError, ValueError, IndexError):
        pass
    return False


def end_process(pid: int, start: int) -> bool:
    """End a process of this user by SIGKILL, unless its number belongs to another one by now; whether it was sent.

    Parameters
    ----------
    pid, start:
        Its number and its `process_start`.
    """
    try:
        descriptor = os.pidfd_open(pid)
    except OSError:
        return False
    try:  # the descriptor stands for the process that the number names now, whatever becomes of the number
        if process_start(pid) != start or os.stat(f"/proc/{pid}").st_uid != os.geteuid():
            return False
        signal.pidfd_send_signal(descriptor, signal.SIGKILL)
        return True
    except OSError:
        return False
    finally:
        os.close(descriptor)


def process_age_ms() -> float | None:
    """Milliseconds since this process started, or None where /proc is not available."""
    started = _asked_for_at or process_start(os.getpid())
    try:
        with open("/proc/uptime", encoding="ascii") as file:
            uptime = float(file.read().split()[0])
    except (OSError, ValueError, IndexError):
        return None
    return (uptime - started / os.sysconf("SC_CLK_TCK")) * 1000 if started else None


def count_age_from(pid: int) -> None:
    """Count this process's age from the start of another one, which has asked for it."""
    global _asked_for_at
    _asked_for_at = process_start(pid)


def _stat(pid: int) -> list[bytes]:
    """Fields of ``/proc/<pid>/stat`` from the third one, the state, on; see proc_pid_stat(5)."""
    return Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()

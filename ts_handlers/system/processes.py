"""What the kernel tells of this boot and of its processes."""

from __future__ import annotations

import os
from pathlib import Path


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


def process_age_ms() -> float | None:
    """Milliseconds since this process started, or None where /proc is not available."""
    started = process_start(os.getpid())
    try:
        with open("/proc/uptime", encoding="ascii") as file:
            uptime = float(file.read().split()[0])
    except (OSError, ValueError, IndexError):
        return None
    return (uptime - started / os.sysconf("SC_CLK_TCK")) * 1000 if started else None


def _stat(pid: int) -> list[bytes]:
    """Fields of ``/proc/<pid>/stat`` from the third one, the state, on; see proc_pid_stat(5)."""
    return Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()

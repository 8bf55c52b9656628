"""How many of the machine's processors are idle."""

from __future__ import annotations

import os


def idle_processors() -> int:
    """Processors that run nothing but this thread at this moment; 0 where the kernel does not tell.

    The fourth field of /proc/loadavg is ``running/total`` threads of the whole machine, see proc_loadavg(5).
    """
    try:
        with open("/proc/loadavg", encoding="ascii") as file:
            running = int(file.read().split()[3].partition("/")[0])
        return len(os.sched_getaffinity(0)) - (running - 1)
    except (AttributeError, OSError, ValueError, IndexError):
        return 0

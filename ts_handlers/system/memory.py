"""How much memory this process's machine, or its container, can still give."""

from __future__ import annotations

import contextlib
from pathlib import Path

_CGROUP = Path("/sys/fs/cgroup")


def available_memory(meminfo: Path = Path("/proc/meminfo"), cgroup: Path = _CGROUP) -> int | None:
    """Bytes that can be allocated without others being pushed out; None where the system does not say.

    The least of what Linux calls available and of what is left to the container (control groups, version 2), where file
    pages that nobody uses count as free.

    Examples
    --------
    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> _ = (folder / "meminfo").write_text("MemTotal: 8 kB\\nMemAvailable: 4 kB\\n")
    >>> available_memory(folder / "meminfo", folder)
    4096
    >>> for name, text in (("memory.max", "3000"), ("memory.current", "2000"), ("memory.stat", "inactive_file 500\\n")):
    ...     _ = (folder / name).write_text(text)
    >>> available_memory(folder / "meminfo", folder)
    1500
    """
    found = []
    with contextlib.suppress(OSError, KeyError, ValueError):
        lines = meminfo.read_text().splitlines()
        fields = dict(line.split(":", 1) for line in lines if ":" in line)
        found.append(int(fields["MemAvailable"].split()[0]) * 1024)
    with contextlib.suppress(OSError, KeyError, ValueError):
        limit, used = (int((cgroup / name).read_text()) for name in ("memory.max", "memory.current"))
        stat = dict(line.split(" ", 1) for line in (cgroup / "memory.stat").read_text().splitlines())
        found.append(max(0, limit - used + int(stat["inactive_file"])))
    return min(found, default=None)

"""Bounds on what native code may do to this process, and what it leaves when it ends the process."""

from __future__ import annotations

import contextlib
import faulthandler
import re
import resource
import signal
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def time_limit(seconds: float | None, descriptor: int) -> Iterator[None]:
    """End the process when the block takes longer, with the Python stack in `descriptor`.

    This is `faulthandler`'s watchdog, a C thread that needs no GIL: an endless loop inside `dlopen` holds it, so that
    neither a Python thread nor a Python signal handler would ever run.
    """
    if seconds is None:
        yield
        return
    faulthandler.dump_traceback_later(seconds, exit=True, file=descriptor)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()


@contextlib.contextmanager
def crash_report_to(descriptor: int) -> Iterator[None]:
    """Inside the block a crash, or SIGTERM, writes the stack into `descriptor` before the process ends."""
    enabled = faulthandler.is_enabled()
    faulthandler.enable(file=descriptor)
    faulthandler.register(signal.SIGTERM, file=descriptor, chain=True)
    try:
        yield
    finally:
        faulthandler.unregister(signal.SIGTERM)
        faulthandler.disable()
        if enabled:  # where it wrote to before cannot be asked; standard error is its default
            with contextlib.suppress(OSError, ValueError):
                faulthandler.enable(file=2)


def redirect_crash_report(descriptor: int) -> None:
    """Inside a block of `crash_report_to`: write into another descriptor from now on."""
    faulthandler.enable(file=descriptor)
    faulthandler.register(signal.SIGTERM, file=descriptor, chain=True)


@contextlib.contextmanager
def bounded_memory(megabytes: int | None) -> Iterator[None]:
    """Inside the block the process may add this many MiB of private writable memory to what it has.

    RLIMIT_DATA (Linux 4.7 and later: heap, anonymous mappings, stacks of threads) leaves mapped weights, shared
    libraries and the address space that CUDA reserves alone, which RLIMIT_AS would not.
    """
    if megabytes is None:
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    bound = _data_bytes() + megabytes * 2**20
    for given in (soft, hard):
        bound = bound if given == resource.RLIM_INFINITY else min(bound, given)
    resource.setrlimit(resource.RLIMIT_DATA, (bound, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def _data_bytes() -> int:
    """Private writable memory of this process in bytes."""
    match = re.search(r"^VmData:\s*(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    return int(match[1]) * 1024 if match else 0


def oom_kills(groups: Path = Path("/proc/self/cgroup"), mount: Path = Path("/sys/fs/cgroup")) -> int | None:
    """How many processes of this control group (a container, usually) the kernel has killed for lack of memory.

    Sources: ``memory.events`` (cgroup v2) and ``memory.oom_control`` (v1), the key ``oom_kill``; None where neither is.
    """
    found = _oom_counter(groups, mount)
    return None if found is None else found[1]


def memory_group(groups: Path = Path("/proc/self/cgroup"), mount: Path = Path("/sys/fs/cgroup")) -> str:
    """What names the control group whose kills `oom_kills` counts; empty where none are counted.

    Containers all see their own group as ``/``, so the group's inode, which the kernel gives to no other group of this
    boot, is part of the name.
    """
    found = _oom_counter(groups, mount)
    if found is None:
        return ""
    try:
        status = found[0].stat()
    except OSError:
        return ""
    return f"{status.st_dev}:{status.st_ino}:{found[0]}"


def _oom_counter(groups: Path, mount: Path) -> tuple[Path, int] | None:
    """The folder of this process's memory control group, and its count of kills."""
    with contextlib.suppress(OSError):
        for line in groups.read_text().splitlines():
            _, controllers, group = line.split(":", 2)
            if controllers not in ("", "memory"):
                continue
            base, name = (mount, "memory.events") if not controllers else (mount / "memory", "memory.oom_control")
            for directory in (base / group.lstrip("/"), base):  # a container may see its own group as the root
                with contextlib.suppress(OSError):
                    found = re.search(r"^oom_kill (\d+)$", (directory / name).read_text(), re.MULTILINE)
                    if found:
                        return directory, int(found[1])
    return None

"""Crash markers: a file that a process writes before it runs native code, and what the file tells after a crash.

Layout::

    <state directory>/guards/<key>.<random> := header newline report?
    header                                  := JSON object: `Marker` below
    report                                  := what `faulthandler` wrote when the process ended: "Fatal Python error:
                                               ..." for SIGSEGV, SIGBUS, SIGABRT, SIGILL and SIGFPE, "Timeout (...)!"
                                               for the time limit, a bare stack for SIGTERM; nothing for SIGKILL and
                                               for exit() in native code

See `ts_handlers.guard.state_directory` for the state directory.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import errno
import os
import platform
import re
import time
import uuid
from pathlib import Path

import msgspec

from ts_handlers.errors import UNDECODABLE
from ts_handlers.guard.quarantine import open_dead_marker
from ts_handlers.guard.records import CLOCK_SECONDS, FOR_MEMORY
from ts_handlers.guard.state_directory import MARKERS, files_in
from ts_handlers.system.decoding import decode_json
from ts_handlers.system.files import lock
from ts_handlers.system.process_limits import memory_group, oom_kills
from ts_handlers.system.processes import boot_id

FORGOTTEN_SECONDS = 24 * 3600.0
"""After this long a crash without a trace counts no more."""
FRESH_SECONDS = 900.0
"""A kill for lack of memory is looked for while the marker is younger than this."""


class Marker(msgspec.Struct, frozen=True):
    """What a process says before it runs native code.

    Attributes
    ----------
    key, model, backend, phase, digest, runtime:
        What it is about to try, as in `ts_handlers.guard.records.Quarantine`.
    attempt:
        Number of the attempt, from 0: one above those of the crash records that its process found. So processes that
        start together have the same number, and count once when they die together. Called ``generation`` on disk.
    seconds, memory_mb:
        The time limit, and the bound on new memory in MiB; None for no limit.
    oom_kills:
        As of `ts_handlers.system.process_limits.oom_kills`, before.
    time, host, pid:
        When (UTC), where, and which process.
    thread:
        Of the process: the one that runs the native code, as `threading.get_ident` names it; 0 when unknown.
    boot, group:
        As of `ts_handlers.system.processes.boot_id` and `ts_handlers.system.process_limits.memory_group`: what
        `oom_kills` can be compared within. Empty when unknown, and then it is not compared.
    free:
        Free bytes, before, of the folders whose disks a build fills: the store's and the temporary one.
    """

    key: str
    model: str
    backend: str
    phase: str
    digest: str = msgspec.field(name="seal")
    runtime: dict[str, str]
    attempt: int = msgspec.field(name="generation")
    seconds: float | None
    memory_mb: int | None
    oom_kills: int | None
    time: str
    host: str
    pid: int
    thread: int = 0
    boot: str = ""
    group: str = ""
    free: dict[str, int] = msgspec.field(default_factory=dict)

    def same_work(self, other: Marker) -> bool:
        """Whether two processes tried the same thing in the same runtime."""
        mine = (self.key, self.phase, self.digest, self.runtime)
        return mine == (other.key, other.phase, other.digest, other.runtime)


@dataclasses.dataclass(frozen=True)
class CrashRecord:
    """What a dead process left.

    Attributes
    ----------
    path:
        The marker's file.
    marker:
        What the process was about to do.
    report:
        What `faulthandler` wrote when the process ended; empty when it left no trace.
    began:
        When the marker was written last, in seconds since the epoch.
    silent:
        How many dead processes, this one among them, left as little as this one.
    """

    path: Path
    marker: Marker
    report: str
    began: float
    silent: int = 1

    @property
    def is_forgotten(self) -> bool:
        """Whether it was so long ago that, without a reason, it says nothing; so is one from the future."""
        return not self._is_younger_than(FORGOTTEN_SECONDS)

    def _is_younger_than(self, seconds: float) -> bool:
        return -CLOCK_SECONDS <= time.time() - self.began <= seconds

    @property
    def cause(self) -> tuple[str, str] | None:
        """Reason and stack; the reason is empty when it was asked to end. None when it left no trace.

        What ended in another of its Python threads, a request's for example, is no trace of what this marker is about.
        Threads that native code has started are nobody's, and what happens in them counts.
        """
        memory = self.marker.memory_mb
        bounded = f", allocations bounded to {memory} MiB" if memory is not None and self.marker.phase == "load" else ""
        doing = {"build": "building", "load": "loading or warming up"}.get(self.marker.phase, self.marker.phase)
        if fatal := re.search(r"^Fatal Python error: ([^\n]*)\n*", self.report, re.MULTILINE):
            if self._ended_in_another_thread:
                return None
            return f"{fatal[1]} while {doing}{bounded}", self.report[fatal.end() :]
        if timeout := re.search(r"^Timeout \([^)]*\)!\n*", self.report, re.MULTILINE):
            return f"{doing} took longer than {self.marker.seconds or 0:g} s", self.report[timeout.end() :]
        if self.report:
            return "", self.report
        return (f"{FOR_MEMORY} while {doing}", "") if self._was_killed_for_memory else None

    @property
    def _ended_in_another_thread(self) -> bool:
        current = re.search(r"^Current thread (0x[0-9a-f]+)", self.report, re.MULTILINE)
        return bool(self.marker.thread and current and int(current[1], 16) != self.marker.thread)

    @property
    def _was_killed_for_memory(self) -> bool:
        """Whether the kernel has killed, in this control group and since then, as many processes as ended silently.

        Only for a death of a moment ago: later kills are more likely those of others.
        """
        marker = self.marker
        if marker.oom_kills is None or not marker.boot or not marker.group or marker.host != platform.node():
            return False
        if not self._is_younger_than(FRESH_SECONDS):
            return False
        if (marker.boot, marker.group) != (boot_id(), memory_group()):
            return False
        now = oom_kills()
        return now is not None and now - marker.oom_kills >= self.silent


def read_crash_records(store: Path, key: str = "") -> list[CrashRecord]:
    """What dead processes left for a key, or for all keys."""
    found = []
    for path in files_in(store, MARKERS, key):
        with contextlib.suppress(OSError), open_dead_marker(path) as descriptor:
            header, _, report = os.read(descriptor, 1 << 20).partition(b"\n")
            began = os.fstat(descriptor).st_mtime
            try:
                marker = decode_json(header, Marker)
            except UNDECODABLE:  # its process died, or is at this moment, between making and writing it
                marker = None
            if marker is None or marker.key != path.name.partition(".")[0]:
                if not -CLOCK_SECONDS <= time.time() - began <= FORGOTTEN_SECONDS:
                    path.unlink()
                continue
            found.append(CrashRecord(path, marker, report.decode(errors="replace").strip()[:4000], began))
    if all(crash.report for crash in found):
        return found
    others = read_crash_records(store) if key else found
    groups = collections.Counter(crash.marker.group for crash in others if not crash.report)
    return [dataclasses.replace(crash, silent=groups[crash.marker.group]) for crash in found]


def write_marker(directory: Path, key: str, header: bytes) -> tuple[Path, int]:
    """Make a marker and lock it. Not flushed to the disk: a page cache outlives a process, and only that may die."""
    directory.mkdir(mode=0o700, exist_ok=True)
    path = directory / f"{key}.{uuid.uuid4().hex[:12]}"
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC, 0o600)
    try:
        lock(descriptor, path, wait=True)  # a reader, who finds it empty and ignores it, holds it for a moment
        if os.write(descriptor, header + b"\n") != len(header) + 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    except OSError:
        os.close(descriptor)
        path.unlink(missing_ok=True)
        raise
    return path, descriptor

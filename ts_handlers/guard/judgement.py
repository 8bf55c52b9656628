"""What the markers of dead processes say, turned into quarantines and failed builds; see `ts_handlers.guard.guard`."""

from __future__ import annotations

import contextlib
import platform
import time
from pathlib import Path

import msgspec

from ts_handlers.errors import one_line
from ts_handlers.guard.markers import CrashRecord, Marker, read_crash_records
from ts_handlers.guard.quarantine import read_quarantines, write_record
from ts_handlers.guard.records import (
    FOR_MEMORY,
    LONGEST_UNCERTAIN_SECONDS,
    UNCERTAIN_SECONDS,
    WITHOUT_A_TRACE,
    FailedBuild,
    Quarantine,
    Record,
)
from ts_handlers.settings import Settings
from ts_handlers.system.free_space import free_bytes, full_folder

FORGIVEN = {"build": 2, "load": 1}
"""Crashes without a trace, one after the other, that are not yet a reason."""


def judge(store: Path, digest: str) -> list[Record]:
    """Turn what dead processes left into records, and remove it; returns the records."""
    records: list[Record] = []
    crashes = read_crash_records(store, digest)
    for crash in crashes:
        marker, cause = crash.marker, crash.cause
        if marker.phase == "build" and not (cause and not cause[0]) and not crash.is_forgotten:
            failed = _failed_on_a_full_disk(store, crash)
            if failed is not None:
                records.append(failed)
                with contextlib.suppress(OSError):
                    crash.path.unlink()
                continue
        if cause is None:
            alike = [other for other in crashes if other.cause is None and other.marker.same_work(marker)]
            times = len({other.marker.attempt for other in alike if not other.is_forgotten})
            if crash.is_forgotten:
                cause = "", ""
            elif times <= FORGIVEN.get(marker.phase, 1):
                continue
            else:
                cause = _without_a_trace(times, marker.phase), ""
        if cause[0]:
            record = _quarantine(store, marker, *cause)
            records.append(record)
            if not write_record(store, record):
                continue  # the marker is then what later starts find
        with contextlib.suppress(OSError):
            crash.path.unlink()
    return records


def _quarantine(store: Path, marker: Marker, reason: str, details: str) -> Quarantine:
    """The record of what a marker is about; without a certain cause it holds for a while only.

    One with a certain cause stays as it is, whatever became of the other processes that tried the same.
    """
    record = Quarantine(
        key=marker.key,
        model=marker.model,
        backend=marker.backend,
        phase=marker.phase,
        digest=marker.digest,
        runtime=marker.runtime,
        reason=reason,
        details=details,
        time=marker.time,
        host=marker.host,
        pid=marker.pid,
    )
    if WITHOUT_A_TRACE not in reason and FOR_MEMORY not in reason:
        return record
    count, failed_at = 1, time.time()
    for old in read_quarantines(store, marker.key):
        if isinstance(old, Quarantine) and old.file_name == record.file_name:
            if not old.held_seconds:
                return old
            if old.is_over:
                count = max(count, old.count + 1)
            else:  # of a process that died together with this one
                count, failed_at = old.count, old.failed_at
    held = min(LONGEST_UNCERTAIN_SECONDS, UNCERTAIN_SECONDS * 2.0 ** min(count - 1, 20))
    return msgspec.structs.replace(record, count=count, failed_at=failed_at, held_seconds=held)


def _failed_on_a_full_disk(store: Path, crash: CrashRecord) -> FailedBuild | None:
    """The record of a build that ended its process on a full disk; None where no disk is full."""
    from ts_handlers.guard.failures import CIRCUMSTANTIAL, remember_failure

    full = full_folder(free_bytes(store), crash.marker.free)
    if full is None:
        return None
    folder, free = full
    what = crash.cause[0] if crash.cause else "the process ended while building"
    reason = f"no space left, {free} bytes in {folder}: {what}"
    marker = crash.marker
    return remember_failure(
        store, marker.key, marker.model, marker.backend, reason, CIRCUMSTANTIAL, 0.0, free={folder: free}
    )


def _without_a_trace(times: int, phase: str) -> str:
    return (
        f"the process {WITHOUT_A_TRACE} {times} times in a row in the phase {phase}, as by "
        "SIGKILL (out of memory, or startupTimeout too short), by exit() in native code, or in another thread"
    )


def remember_crash(store: Path, pid: int, reason: str, settings: Settings | None = None) -> None:
    """Keep, as a failed build, what a process of this host was building when its limits or the kernel ended it.

    A crash whose cause its marker tells is left to the next start, which quarantines it.
    """
    from ts_handlers.guard.failures import CIRCUMSTANTIAL, circumstances, remember_failure

    depends = "" if settings is None else circumstances(settings)
    for crash in read_crash_records(store):
        marker, cause = crash.marker, crash.cause
        if (marker.pid, marker.host, marker.digest) == (pid, platform.node(), "") and not (cause and cause[0]):
            took = time.time() - crash.began
            remember_failure(
                store, marker.key, marker.model, marker.backend, one_line(reason), CIRCUMSTANTIAL, took, depends=depends
            )

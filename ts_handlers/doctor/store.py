"""Checks of the store, and of a model's settings against what the store knows."""

from __future__ import annotations

import fcntl
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

from ts_handlers.doctor.base import Finding, Question
from ts_handlers.errors import SettingsError
from ts_handlers.guard.failures import build_runtime
from ts_handlers.guard.markers import read_crash_records
from ts_handlers.guard.quarantine import read_quarantines
from ts_handlers.guard.records import WITHOUT_A_TRACE, FailedBuild
from ts_handlers.key.fingerprint import runtime_identity
from ts_handlers.settings import DEFAULT_STARTUP_TIMEOUT_SECONDS
from ts_handlers.store.address import safe_name
from ts_handlers.store.entry import Manifest
from ts_handlers.store.local.layout import EVICTED
from ts_handlers.store.upkeep.scan import scan_entries, scan_trash
from ts_handlers.system.ownership import is_ours_or_roots, others_may_write

FREE_BYTES = 2 << 30


def check_root(question: Question) -> Iterator[Finding]:
    """The store's root: that it can be used, whose it is, and whether locks work in it."""
    root = question.store
    if not root.exists():
        parent = next(part for part in root.parents if part.exists())
        if os.access(parent, os.W_OK | os.X_OK):
            yield Finding("store", "ok", f"{root} does not exist; the first start makes it")
        else:
            remedy = f"make {root} for uid {os.geteuid()} with mode 0700, or name another with TS_HANDLERS_CACHE"
            yield Finding("store", "fail", f"{root} does not exist and {parent} cannot be written", remedy)
        return
    status = root.stat()
    me = os.geteuid()
    if not stat.S_ISDIR(status.st_mode) or not os.access(root, os.R_OK | os.X_OK):
        yield Finding("store", "fail", f"{root} is no folder that uid {me} can read", "name another, or chmod u+rx it")
    elif not is_ours_or_roots(status):
        found = f"{root} belongs to uid {status.st_uid}, this process runs as uid {me}"
        yield Finding("store", "fail", found, f"chown -R {me} {root}, or name another store")
    elif others_may_write(status):
        found = f"{root} is writable by others (mode {stat.S_IMODE(status.st_mode):04o}), and an entry is code"
        yield Finding("store", "fail", found, f"chmod go-w {root}")
    elif not os.access(root, os.W_OK):
        remedy = "nothing to do if everything is built elsewhere (on_miss: fail says so); otherwise make it writable"
        yield Finding("store", "warn", f"{root} cannot be written: nothing is built or recorded in it", remedy)
    elif (problem := _lock_problem(root)) is not None:
        remedy = "put the store on a local disk, or on a network file system with locks"
        yield Finding("store", "warn", f"{root}: no file locks ({problem}), so several workers build the same", remedy)
    else:
        yield Finding("store", "ok", f"{root}, mode {stat.S_IMODE(status.st_mode):04o}")


def _lock_problem(root: Path) -> str | None:
    try:
        with tempfile.TemporaryFile(dir=root) as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.strerror or str(error)
    return None


def check_space(question: Question) -> Iterator[Finding]:
    """Free space and inodes where the store lies."""
    root = next(path for path in (question.store, *question.store.parents) if path.exists())
    usage, inodes = shutil.disk_usage(root), os.statvfs(root)
    sizes = [sum(file.size for file in manifest.files.values()) for _, manifest in _manifests(question.store)]
    needed = max(FREE_BYTES, 2 * max(sizes, default=0))
    found = f"{usage.free / 2**30:.1f} GiB free of {usage.total / 2**30:.1f} GiB"
    if usage.free < needed:
        remedy = f"free {(needed - usage.free) / 2**30:.1f} GiB, or move the store; what is not kept is built again"
        yield Finding("space", "warn", found, remedy)
    elif inodes.f_files and inodes.f_favail < 10_000:
        yield Finding(
            "space", "warn", f"{found}, {inodes.f_favail} inodes free", "remove small files, or move the store"
        )
    else:
        yield Finding("space", "ok", found)


def check_quarantine(question: Question) -> Iterator[Finding]:
    """Entries and builds that are not tried here, builds that failed, damaged entries that were moved aside."""
    records = read_quarantines(question.store)
    for record in records:
        failed = isinstance(record, FailedBuild)
        runtime = build_runtime() if failed else runtime_identity()
        here = "" if record.runtime == runtime else " (in another runtime than this one)"
        remedy = f"remove the cause, then ts-handlers unquarantine {record.key[:12]} --store {question.store}"
        found = f"{record.model}, {record.backend}, key {record.key}, {record.time}{here}: {record.reason}"
        if failed:
            found += f" (a build that failed {record.count} times; tried again {record.retry})"
        yield Finding("quarantine", "ok" if here else "warn", found, remedy)
    aside = [item for item in scan_trash(question.store) if not item.name.startswith(EVICTED)]
    if aside:
        found = f"{len(aside)} damaged entries were moved aside: {aside[0].reason}"
        yield Finding("damage", "warn", found, "find out what damages them (disk, a copy); ts-handlers gc removes them")
    if not records and not aside:
        yield Finding("quarantine", "ok", "none")


def check_time_limits(question: Question) -> Iterator[Finding]:
    """Builds that a time limit, or somebody who names no reason, has ended."""
    raise_startup = "raise startupTimeout above what the build takes, or set on_miss: background, or prewarm"
    ended = 0
    for record in read_quarantines(question.store):
        if question.model not in (None, record.model) or record.phase != "build":
            continue
        what = f"building {record.model} with {record.backend}: {record.reason}"
        failed = isinstance(record, FailedBuild)
        if failed and "background.seconds" in record.reason:
            yield Finding("time limits", "warn", what, "raise background.seconds, or prewarm where there is time")
        elif not failed and WITHOUT_A_TRACE in record.reason:
            yield Finding("time limits", "warn", what, raise_startup)
        else:
            continue
        ended += 1
    for crash in read_crash_records(question.store):
        marker = crash.marker
        if question.model in (None, marker.model) and marker.phase == "build" and crash.cause is None:
            ended += 1
            found = f"building {marker.model} with {marker.backend}, begun {marker.time}, was killed without a trace"
            yield Finding("time limits", "warn", f"{found}, as TorchServe does after startupTimeout", raise_startup)
    if not ended:
        yield Finding("time limits", "ok", "none has ended a build")


def check_model_config(question: Question) -> Iterator[Finding]:
    """A model's settings, and TorchServe's time limits against the recorded builds."""
    if question.model_config is None:
        return
    try:
        config, settings = question.config, question.settings
    except SettingsError as error:
        yield Finding("settings", "fail", str(error), f"correct {question.model_config}")
        return
    yield Finding("settings", "ok", f"backends {', '.join(settings.backends)}; on_miss {settings.on_miss}")
    limit = config.get("startupTimeout", DEFAULT_STARTUP_TIMEOUT_SECONDS)
    if not isinstance(limit, (int, float)) or isinstance(limit, bool):
        found = f"startupTimeout: expected seconds, found {limit!r}"
        yield Finding("startup time", "fail", found, "write it as a number of seconds")
        return
    builds = {
        name: sum(manifest.build_ms.values()) / 1000
        for name, manifest in _manifests(question.store)
        if (question.model is None or safe_name(question.model) == name) and manifest.backend in settings.backends
    }
    slowest = max(builds, key=builds.__getitem__, default=None)
    if slowest is None:
        found = f"startupTimeout is {limit:g} s; no build of {question.model or 'any model'} is recorded yet"
        if settings.on_miss == "compile" and "startupTimeout" not in config:
            yield Finding("startup time", "warn", found, "set startupTimeout: 600 for the first build")
        else:
            yield Finding("startup time", "ok", found)
    else:
        took = builds[slowest]
        found = f"startupTimeout is {limit:g} s; building {slowest} took {took:.0f} s"
        if settings.on_miss == "compile" and took > 0.8 * limit:
            remedy = f"set startupTimeout: {int(took * 3) + 60}, or on_miss: background"
            yield Finding("startup time", "fail" if took >= limit else "warn", found, remedy)
        else:
            yield Finding("startup time", "ok", found)
    load = settings.guard.load_seconds
    if isinstance(load, (int, float)) and load >= limit:
        found = f"guard.load_seconds {load:g} is not below startupTimeout {limit:g}: TorchServe kills first"
        yield Finding("startup time", "warn", found, "make startupTimeout longer than load_seconds")


def _manifests(root: Path) -> list[tuple[str, Manifest]]:
    """(model name, manifest) of the sound entries; of a model's several builds the slowest comes last."""
    found = [(info.model, info.manifest) for info in scan_entries(root) if info.manifest is not None]
    return sorted(found, key=lambda pair: sum(pair[1].build_ms.values()))

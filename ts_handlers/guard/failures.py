"""Builds that failed with an exception: remembered, so that not every worker repeats them at every start.

A failure is a `ts_handlers.guard.records.FailedBuild`, which holds for a while only. How long depends on its kind:

- ``deterministic``: the model, the settings or the toolchain are at fault, and all of these are in the key (an operator
  that cannot be exported). Held for an hour, twice as long after each further failure, for a day at most.
- ``circumstantial``: the machine was (no space, no memory, a failing disk, a time limit, a compiler that was killed).
  Held for a minute, or as long as the attempt took, twice as long after each further failure, for an hour at most.

A build that succeeds removes the record. See docs/decisions/0019-failed-builds.md.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import platform
import re
import subprocess
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import msgspec

from ts_handlers.guard.quarantine import read_quarantines, record_files, write_record
from ts_handlers.guard.records import LONGEST_HOLD_SECONDS, FailedBuild
from ts_handlers.key.digests import digest_text
from ts_handlers.key.fingerprint import compiler_identity, runtime_identity
from ts_handlers.settings import Settings

logger = logging.getLogger(__name__)

DETERMINISTIC, CIRCUMSTANTIAL = "deterministic", "circumstantial"
HOLD_SECONDS = {DETERMINISTIC: (3600.0, LONGEST_HOLD_SECONDS), CIRCUMSTANTIAL: (60.0, 3600.0)}
"""How long the first failure of a kind holds, and the longest that any does."""

_NO_SPACE = re.compile(r"No space left on device|Disk quota exceeded|errno 28\b", re.IGNORECASE)
_PASSING = (errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN, errno.ESTALE)
_PASSING_TEXT = re.compile("|".join(map(os.strerror, _PASSING)) + "|failed to map segment", re.IGNORECASE)
# A compiler is a child process, whose errors come as text.
_CIRCUMSTANCES = re.compile(
    r"out of memory|Cannot allocate memory|std::bad_alloc|Input/output error|Killed signal|Too many open files"
    r"|Resource temporarily unavailable|CUDA error|timed out|terminated with signal",
    re.IGNORECASE,
)


def kind_of(error: BaseException) -> str:
    """Whether an error says something about the model and the toolchain or about the machine at that moment.

    A wrong verdict costs time: another attempt too early or too late.

    Examples
    --------
    >>> kind_of(RuntimeError("unsupported operator")), kind_of(OSError(5, "Input/output error"))
    ('deterministic', 'circumstantial')
    """
    return CIRCUMSTANTIAL if any(map(_is_circumstance, _causes(error))) or is_disk_full(error) else DETERMINISTIC


def _is_circumstance(error: BaseException) -> bool:
    if isinstance(error, (OSError, MemoryError, subprocess.TimeoutExpired)):
        return True
    if isinstance(error, subprocess.CalledProcessError):
        return error.returncode < 0
    return _CIRCUMSTANCES.search(f"{type(error).__name__}: {error}") is not None


def is_disk_full(error: BaseException) -> bool:
    """Whether an error, or one that it came from, says that a disk or a quota of it is full."""
    return any(
        (isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT))
        or _NO_SPACE.search(str(cause)) is not None
        for cause in _causes(error)
    )


def is_passing(error: BaseException) -> bool:
    """Whether an error, or one that it came from, is one of the system that says nothing about the files at hand.

    Examples
    --------
    >>> is_passing(OSError(5, "Input/output error")), is_passing(FileNotFoundError(2, "No such file or directory"))
    (True, False)
    """
    return any(
        (isinstance(cause, OSError) and cause.errno in _PASSING) or _PASSING_TEXT.search(str(cause)) is not None
        for cause in _causes(error)
    )


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error and what it came from."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def build_runtime() -> dict[str, str]:
    """What a failed build met beside its key: with another compiler it is tried again."""
    return {**runtime_identity(), "compiler": compiler_identity()}


def circumstances(settings: Settings) -> str:
    """Digest of the settings and variables on which a build's success depends, and which are not in the key.

    With others a build that failed is tried at once: they are what a user changes after a failure.
    """
    contexts = settings.contexts
    facts = {
        **{name: getattr(settings, name) for name in _SETTINGS},
        "contexts": [contexts.count, contexts.scratch, contexts.cuda_graphs],
        "environment": {name: os.environ.get(name) for name in _ENVIRONMENT},
    }
    return digest_text(msgspec.json.encode(facts, order="deterministic").decode())[:16]


_SETTINGS = ("inputs", "warmup", "canary", "guard", "background", "tensorrt", "compile")
_ENVIRONMENT = ("CC", "CXX", "CUDA_HOME", "CUDA_PATH", "LD_LIBRARY_PATH", "LD_PRELOAD", "TMPDIR")


def is_hopeless(record: FailedBuild) -> bool:
    """Whether another attempt will hardly end otherwise: the model is at fault, or the machine was so repeatedly."""
    return record.kind == DETERMINISTIC or record.count > 1


def remember_failure(
    store: Path,
    key: str,
    model: str,
    backend: str,
    reason: str,
    kind: str,
    seconds: float,
    *,
    unbuildable: bool = True,
    free: Mapping[str, int] | None = None,
    depends: str = "",
) -> FailedBuild | None:
    """Keep a record of a build that failed.

    Parameters
    ----------
    store:
        The store's folder on this host.
    key:
        Digest of the cache key.
    reason:
        What went wrong, in one line.
    kind:
        See `kind_of`.
    seconds:
        What the attempt took.
    unbuildable:
        Whether the backend said that it cannot build the model, as by `BuildError`.
    free:
        Free bytes of the folders in which there was no room.
    depends:
        See `circumstances`; with others than last time the count begins again.

    Returns
    -------
    The record, or None when it can be written nowhere: then the next start tries again.
    """
    now = time.time()
    new = FailedBuild(
        key=key,
        model=model,
        backend=backend,
        runtime=build_runtime(),
        reason=reason,
        time=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(now)),
        host=platform.node(),
        pid=os.getpid(),
        kind=kind,
        failed_at=now,
        unbuildable=unbuildable,
        free=dict(free or {}),
        depends=depends,
    )
    before = [
        old.count
        for old in read_quarantines(store, key)
        if isinstance(old, FailedBuild) and (old.kind, old.file_name, old.depends) == (kind, new.file_name, depends)
    ]
    count = max(before, default=0) + 1
    first, longest = HOLD_SECONDS[kind]
    if kind == CIRCUMSTANTIAL:
        first = max(first, seconds)
    held = min(longest, first * 2.0 ** min(count - 1, 20))
    record = msgspec.structs.replace(new, count=count, held_seconds=held)
    return record if write_record(store, record) else None


def forget_failures(store: Path, key: str) -> None:
    """Remove the failures of a key: it has been built."""
    for path, record in record_files(store, key):
        if isinstance(record, FailedBuild):
            with contextlib.suppress(OSError):
                path.unlink()
                logger.info("%s has been built; it had failed %d times", key, record.count)

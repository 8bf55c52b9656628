"""Build leases: one process of a host builds a key at a time.

The lease is a `flock` on a file, which the kernel releases when its holder dies, however it dies. Beside the lock
stands a status file by which waiters tell what the holder is doing; it is information only and may be stale or missing.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ts_handlers.errors import UNDECODABLE
from ts_handlers.store.local.layout import LEASE_LOCK, LEASE_STATUS
from ts_handlers.system.files import close_if_same, open_locked, write_atomically

logger = logging.getLogger(__name__)

POLL_SECONDS = 0.05
LOG_EVERY_SECONDS = 10.0


class Lease:
    """A held (or, where no lock can be made, an assumed) right to build one key.

    `waited` tells how long it took to get, in seconds.
    """

    def __init__(self, status: Path | None, waited: float) -> None:
        self._status = status
        self.waited = waited
        self._facts: dict[str, object] = {}

    def report(self, **facts: object) -> None:
        """Tell the waiters what the holder is doing."""
        self._facts.update(facts)
        if self._status is None:
            return
        with contextlib.suppress(OSError):
            write_atomically(self._status, json.dumps(self._facts))


@contextlib.contextmanager
def hold_lease(directory: Path, name: str, estimate: float | None) -> Iterator[Lease]:
    """Hold the lease `name`, waiting for its holder if there is one.

    Where the lock file cannot be made (a read-only or full store) the block runs without a lease: availability before
    de-duplication.

    Parameters
    ----------
    directory:
        Where lock and status files lie.
    estimate:
        Seconds that a build took before, for the waiters' log line; None when unknown.
    """
    status = directory / f"{name}{LEASE_STATUS}"
    started = time.monotonic()
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = _take(directory / f"{name}{LEASE_LOCK}")
        if descriptor is None:
            descriptor = _wait(directory, name, estimate)
        identity = os.fstat(descriptor)
    except OSError as error:
        logger.warning("no lease for %s (%s); building without one", name, error)
        yield Lease(None, time.monotonic() - started)
        return
    try:
        lease = Lease(status, time.monotonic() - started)
        lease.report(pid=os.getpid(), started=time.time(), phase="starting", estimate=estimate)
        yield lease
    finally:
        with contextlib.suppress(OSError):
            status.unlink()
        close_if_same(descriptor, identity)  # native code of the build may have closed what is not its own


def _take(path: Path) -> int | None:
    """The descriptor of a lock file that is locked now; None while another process holds it."""
    while True:
        try:
            return open_locked(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW)
        except BlockingIOError:
            return None
        except FileNotFoundError:  # the collector has removed it between opening and locking it
            if not path.parent.exists():
                raise


def _wait(directory: Path, name: str, estimate: float | None) -> int:
    """Wait for the holder, and say now and then what it is doing; the descriptor of the lock."""
    logger.info("another process builds %s: %s", name, describe_holder(directory, name, 0.0, estimate))
    started = last = time.monotonic()
    while True:
        time.sleep(POLL_SECONDS)
        descriptor = _take(directory / f"{name}{LEASE_LOCK}")
        if descriptor is not None:
            return descriptor
        now = time.monotonic()
        if now - last >= LOG_EVERY_SECONDS:
            last = now
            logger.info("still waiting for %s: %s", name, describe_holder(directory, name, now - started, estimate))


def read_status(directory: Path, name: str) -> dict[str, Any]:
    """What the holder of a lease last reported; empty when there is no holder or its report cannot be read."""
    try:
        facts = json.loads((directory / f"{name}{LEASE_STATUS}").read_text())
    except (OSError, *UNDECODABLE):
        return {}
    return facts if isinstance(facts, dict) else {}


def describe_holder(directory: Path, name: str, waited: float, estimate: float | None) -> str:
    """What the holder of a lease is doing, for the log of a process that has waited `waited` seconds for it."""
    try:
        facts = read_status(directory, name)
        elapsed = max(0.0, time.time() - float(facts["started"]))
        known = facts.get("estimate") or estimate
        expected = f", {known:.0f} s expected" if known else ""
        return f"pid {facts['pid']}, phase {facts['phase']}, {elapsed:.0f} s since its start{expected}"
    except (ValueError, KeyError, TypeError, OverflowError):
        return f"waited {waited:.0f} s" + (f", {estimate:.0f} s expected" if estimate else "")

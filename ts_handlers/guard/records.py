"""What is not tried again, each with its reason: quarantined artifacts and builds, and builds that failed.

One record is one file below ``quarantine`` of a state directory (`ts_handlers.guard.state_directory`), a JSON object::

    <key>-<identity>.json          `Quarantine` of an entry
    <key>-build-<identity>.json    `Quarantine` or `FailedBuild` of whatever is built under the key

Both kinds of record have the same fields on disk, see `stored_fields`: ``kind`` is empty for a `Quarantine`, and the
fields that only the other kind needs have their defaults.
"""

from __future__ import annotations

import calendar
import time
from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from ts_handlers.key.digests import digest_text
from ts_handlers.system.decoding import decode_json
from ts_handlers.system.durations import span
from ts_handlers.system.free_space import has_more_room

BUILD = "build-"
"""How the identity in a file's name begins when the record says something about builds only."""
LONGEST_HOLD_SECONDS = 86400.0
"""No build that failed with an exception is held back for longer."""
UNCERTAIN_SECONDS = 86400.0
"""How long the first quarantine without a certain cause holds; each further one of the same thing twice as long."""
LONGEST_UNCERTAIN_SECONDS = 30 * 86400.0
CLOCK_SECONDS = 300.0
"""How far the clock of another host may be ahead: what comes from a later future was written by a wrong clock."""
WITHOUT_A_TRACE = "ended without a trace"
FOR_MEMORY = "killed by the kernel for lack of memory"


class Quarantine(msgspec.Struct, frozen=True):
    """An entry, or a build, that ended its process or answered wrongly; not tried again until it is lifted.

    One whose cause is uncertain, because the process left no trace or the kernel chose a victim, is lifted by time.

    Attributes
    ----------
    key, model, backend:
        Digest of the cache key, and two of the things behind it.
    phase:
        ``build``, ``load`` (load, canary or warm-up ended the process) or ``canary`` (wrong answers).
    digest:
        Digest of the entry's manifest; empty for whatever is built under this key. Called ``seal`` on disk.
    runtime:
        The libraries at hand, see `ts_handlers.key.fingerprint.runtime_identity`: with others it is tried again.
    reason, details:
        One line, and the Python stack of the moment where there is one.
    weights, canary:
        Digest of the weights and the canary's settings that the artifact failed with; empty when it fails with all.
    time, host, pid:
        When (UTC), where, and which process.
    count, failed_at, held_seconds:
        Of one that is lifted by time: how many there were in a row, when this one was recorded in seconds since the
        epoch, and how long it holds; 0 seconds for one that holds until somebody lifts it.
    """

    key: str
    model: str
    backend: str
    phase: str
    digest: str = msgspec.field(name="seal")
    runtime: dict[str, str]
    reason: str
    details: str = ""
    weights: str = ""
    canary: str = ""
    time: str = ""
    host: str = ""
    pid: int = 0
    count: int = 1
    failed_at: float = 0.0
    held_seconds: float = 0.0

    def applies(self, digest: str, runtime: Mapping[str, str], canary: str, weights: Callable[[], str]) -> bool:
        """Whether an entry with this manifest digest (empty: a build) is refused; asks for `weights` if it matters."""
        if self.digest != digest or self.runtime != runtime or self.is_over:
            return False
        return not self.weights or (self.canary == canary and self.weights == weights())

    @property
    def is_over(self) -> bool:
        """Whether time has lifted it. Where the clock was wrong, then or now, it has rather too early than never."""
        if not self.held_seconds:
            return False
        age = time.time() - self.failed_at
        return not -CLOCK_SECONDS <= age < min(self.held_seconds, LONGEST_UNCERTAIN_SECONDS)

    @property
    def retry(self) -> str:
        """When it is tried again, in words."""
        if not self.held_seconds:
            return "when lifted"
        return "by the next start" if self.is_over else f"in {span(self.failed_at + self.held_seconds - time.time())}"

    @property
    def file_name(self) -> str:
        """Equal for records of the same thing, so that processes that find it out together write one file."""
        return _file_name(self.key, self.phase, self.digest, self.weights, self.canary, self.runtime)


class FailedBuild(msgspec.Struct, frozen=True):
    """A build that ended with an exception; not tried again for a while, see `ts_handlers.guard.failures`.

    Attributes
    ----------
    key, model, backend, reason, time, host, pid:
        As in `Quarantine`.
    runtime:
        The libraries and the compiler at hand, see `ts_handlers.guard.failures.build_runtime`.
    kind:
        What was at fault: ``deterministic`` or ``circumstantial``.
    count:
        How many builds in a row have failed so.
    failed_at:
        When the latest did, in seconds since the epoch.
    held_seconds:
        How long after that nobody tries again.
    unbuildable:
        Whether the exception was a `BuildError`: the backend cannot build the model.
    free:
        Free bytes of the folders in which there was no room; with more room it is tried again at once.
    depends:
        What else the build depended on, see `ts_handlers.guard.failures.circumstances`; empty in records of older
        versions, which hold whatever that is now.
    """

    key: str
    model: str
    backend: str
    runtime: dict[str, str]
    reason: str
    kind: str
    count: int = 1
    failed_at: float = 0.0
    held_seconds: float = 0.0
    unbuildable: bool = True
    depends: str = ""
    time: str = ""
    host: str = ""
    pid: int = 0
    free: dict[str, int] = msgspec.field(default_factory=dict)

    @property
    def phase(self) -> str:
        """As in `Quarantine`."""
        return "build"

    @property
    def digest(self) -> str:
        """As in `Quarantine`: empty, because there is no entry."""
        return ""

    @property
    def is_over(self) -> bool:
        """Whether the build may be tried again; a clock that was set back makes it wait no longer than that."""
        return has_more_room(self.free) or abs(time.time() - self.failed_at) >= min(
            self.held_seconds, LONGEST_HOLD_SECONDS
        )

    @property
    def retry(self) -> str:
        """When it is tried again, in words."""
        if self.is_over:
            return "by the next start"
        room = ", or when there is more room" if self.free else ""
        return f"in {span(self.failed_at + self.held_seconds - time.time())}{room}"

    @property
    def file_name(self) -> str:
        """As in `Quarantine`; the same for each kind of failure."""
        return _file_name(self.key, self.phase, "", "", "", self.runtime)


Record = Quarantine | FailedBuild


class _Kind(msgspec.Struct):
    kind: str = ""


def decode_record(data: bytes) -> Record:
    """A record from its file's content. Raises one of `ts_handlers.errors.UNDECODABLE`."""
    is_failed_build = bool(decode_json(data, _Kind).kind)
    if is_failed_build:
        return decode_json(data, FailedBuild)
    record = decode_json(data, Quarantine)
    if not record.held_seconds and (WITHOUT_A_TRACE in record.reason or FOR_MEMORY in record.reason):
        # Of a version that held these for ever.
        return msgspec.structs.replace(record, failed_at=_seconds_of(record.time), held_seconds=UNCERTAIN_SECONDS)
    return record


def _seconds_of(when: str) -> float:
    """Seconds since the epoch of the text in `Quarantine.time`; 0 when it is none."""
    try:
        return float(calendar.timegm(time.strptime(when, "%Y-%m-%dT%H:%M:%SZ")))
    except ValueError:
        return 0.0


def encode_record(record: Record) -> bytes:
    """The content of a record's file."""
    return msgspec.json.format(msgspec.json.encode(stored_fields(record)), indent=1)


def stored_fields(record: Record) -> dict[str, Any]:
    """A record as the JSON object that is stored, and that ``ts-handlers`` prints with ``--json``."""
    fields = msgspec.to_builtins(record)
    if isinstance(record, Quarantine):
        return {**fields, "kind": "", "unbuildable": True}
    for name in ("free", "depends"):
        if not fields[name]:  # as older versions wrote it
            del fields[name]
    return {**fields, "phase": record.phase, "seal": "", "details": "", "weights": "", "canary": ""}


def _file_name(key: str, phase: str, digest: str, weights: str, canary: str, runtime: Mapping[str, str]) -> str:
    identity = "\n".join([phase, digest, weights, canary, str(sorted(runtime.items()))])
    return f"{key}-{'' if digest else BUILD}{digest_text(identity)[:12]}.json"

"""Eviction: which entries go when a quota is exceeded, and how they go without disturbing who uses them.

`plan` is pure: from what was found and the quotas to a list of evictions with reasons. `evict` carries one of them out.
Each step of it leaves a state that a crash may leave for ever: an entry is renamed into the trash first (from then on
it is a miss) and deleted afterwards, and what a dead process has left there is collected later (`store.garbage`).

Least recently used goes first, by the store's own record of uses. Entries that are pinned, or that a living process
reads, stay, whatever the quotas say.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import uuid
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from ts_handlers.settings.quantities import parse_bytes
from ts_handlers.settings.sections import Quota
from ts_handlers.store.local.layout import CANARIES, EVICTED, TRASH, USAGE, VERIFIED
from ts_handlers.store.local.pins import is_pinned
from ts_handlers.store.local.usage import exclusive, in_use, read_use, touch_use
from ts_handlers.store.local.verified import record_name
from ts_handlers.store.upkeep.scan import EntryInfo, entry_folders, scan_entries


@dataclasses.dataclass(frozen=True)
class Quotas:
    """The most that the store, or one model in it, may hold; None is no bound."""

    bytes: int | None = None
    entries: int | None = None
    inodes: int | None = None

    @classmethod
    def of(cls, quota: Quota) -> Quotas:
        """The quotas that settings ask for."""
        return cls(None if quota.bytes is None else parse_bytes(quota.bytes), quota.entries, quota.inodes)

    def exceeded_by(self, candidates: Iterable[Candidate]) -> str | None:
        """What is above its bound, as ``bytes: 30 of 20``; None when nothing is."""
        candidates = list(candidates)
        found = {
            "bytes": sum(candidate.bytes for candidate in candidates),
            "entries": len(candidates),
            "inodes": sum(candidate.inodes for candidate in candidates),
        }
        for name, count in found.items():
            limit = getattr(self, name)
            if limit is not None and count > limit:
                return f"{name}: {count} of {limit}"
        return None


@dataclasses.dataclass(frozen=True)
class Candidate:
    """What `plan` needs to know of an entry.

    `last_used` is the time of the last use or of the publication, whichever is later, in seconds since the epoch.
    `kept_because` says why it must stay; None when it may go.
    """

    directory: Path
    model: str
    key: str
    bytes: int
    inodes: int
    last_used: float
    kept_because: str | None = None


@dataclasses.dataclass(frozen=True)
class Eviction:
    """One entry that is to go, and why."""

    candidate: Candidate
    reason: str


@dataclasses.dataclass(frozen=True)
class EvictionPlan:
    """Evictions in order, and the quotas that stay exceeded because of what must stay."""

    evictions: tuple[Eviction, ...]
    unmet: tuple[str, ...]


def plan(candidates: Sequence[Candidate], store: Quotas, per_model: Quotas) -> EvictionPlan:
    """Choose what goes so that the store and every model in it keep their quotas.

    Examples
    --------
    >>> old, new = (Candidate(Path(key), "m", key, 10, 3, used) for key, used in (("a", 1.0), ("b", 2.0)))
    >>> [(e.candidate.key, e.reason) for e in plan([new, old], Quotas(bytes=15), Quotas()).evictions]
    [('a', 'the store exceeds its quota of bytes: 20 of 15')]
    """
    remaining = sorted(candidates, key=lambda candidate: (candidate.last_used, str(candidate.directory)))
    evictions: list[Eviction] = []
    unmet: list[str] = []
    scopes: list[tuple[str, Quotas, str | None]] = [
        *((f"model {model}", per_model, model) for model in sorted({candidate.model for candidate in candidates})),
        ("the store", store, None),
    ]
    for name, quotas, model in scopes:
        while True:
            inside = [candidate for candidate in remaining if model in (None, candidate.model)]
            excess = quotas.exceeded_by(inside)
            if excess is None:
                break
            victim = next((candidate for candidate in inside if candidate.kept_because is None), None)
            if victim is None:
                unmet.append(f"{name} exceeds its quota of {excess}; the rest is pinned or in use")
                break
            remaining.remove(victim)
            evictions.append(Eviction(victim, f"{name} exceeds its quota of {excess}"))
    return EvictionPlan(tuple(evictions), tuple(unmet))


def find_candidates(root: Path, refused: Iterable[Path] = ()) -> list[Candidate]:
    """Every entry, with the reason for which it must stay; entries in `refused` have just been found in use."""
    refused = set(refused)
    found = []
    for entry in scan_entries(root):
        busy = entry.directory in refused or in_use(entry.directory)
        if busy:
            touch_use(root, entry.key)  # a process may have read it for longer than others have not been used at all
        kept = "pinned" if entry.pinned else "in use" if busy else None
        found.append(candidate_of(entry, kept))
    return found


def candidate_of(entry: EntryInfo, kept_because: str | None = None) -> Candidate:
    """A scanned entry as `plan` takes it."""
    last_used = max(entry.last_used or 0.0, entry.published)
    return Candidate(
        entry.directory, entry.model, entry.key, entry.bytes, entry.inodes, last_used, kept_because=kept_because
    )


def evict(root: Path, eviction: Eviction) -> str | None:
    """Remove one entry, unless it has been used, pinned or replaced since the plan was made.

    Returns
    -------
    None when the entry is gone, otherwise why it is still there.
    """
    candidate = eviction.candidate

    def refusal() -> str | None:
        if is_pinned(root, candidate.key):
            return "pinned"
        last_used, _ = read_use(root, candidate.key)
        return "used since" if (last_used or 0.0) > candidate.last_used else None

    return remove_entry(root, candidate.directory, refusal)


def remove_entry(root: Path, directory: Path, refusal: Callable[[], str | None] = lambda: None) -> str | None:
    """Remove an entry that no process reads.

    Parameters
    ----------
    refusal:
        Asked while the entry is locked; a text keeps the entry.

    Returns
    -------
    None when the entry is gone, otherwise why it is still there.
    """
    trash = root / TRASH / f"{EVICTED}{directory.name}-{uuid.uuid4().hex[:8]}"
    try:
        with exclusive(directory) as busy:
            reason = busy or refusal()
            if reason is not None:
                return reason
            trash.parent.mkdir(mode=0o700, exist_ok=True)
            os.rename(directory, trash)
    except FileNotFoundError:
        return None  # somebody else has removed it
    except OSError as error:
        return f"cannot be removed: {error.strerror or error}"
    shutil.rmtree(trash, ignore_errors=True)
    _forget(root, directory)
    return None


def _forget(root: Path, directory: Path) -> None:
    """Remove what the store keeps beside an entry that has gone, and the folders above it that are empty now."""
    key = directory.name
    with contextlib.suppress(OSError):
        (root / VERIFIED / record_name(os.path.realpath(directory))).unlink(missing_ok=True)
    if all(other.name != key for other in entry_folders(root)):
        shutil.rmtree(root / CANARIES / key, ignore_errors=True)
        with contextlib.suppress(OSError):
            (root / USAGE / key).unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # not empty; a publisher that loses its folder here makes it again
        for folder in list(directory.parents)[:3]:
            folder.rmdir()

"""What dead processes leave is collected, what living ones have is not."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.entries import address, fill, manifest_of, publish
from ts_handlers.store.base import Hit
from ts_handlers.store.entry import write_manifest
from ts_handlers.store.local import pins
from ts_handlers.store.local.store import LocalStore
from ts_handlers.store.local.trash import move_aside
from ts_handlers.store.upkeep.eviction import Quotas
from ts_handlers.store.upkeep.garbage import CANARIES_PER_KEY, find_garbage
from ts_handlers.store.upkeep.space import make_room

KEY = "0f" * 16
WRITER = "17.0123456789abcdef"  # process and random part of a temporary name
DAY = 86400.0


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "store")


def write(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"content")
    return path


def staged(store: LocalStore) -> Path:
    directory = store.root / "staging" / f"{KEY}-1"
    directory.mkdir(parents=True)
    fill(directory)
    write_manifest(directory, manifest_of(address(), directory))
    return directory


def half_evicted(store: LocalStore) -> Path:
    path = store.root / "trash" / f"evicted-{KEY}-1"
    write(path / "code" / "model.so")
    return path


def aside(store: LocalStore) -> Path:
    return move_aside(store.root, publish(store, address()), "digest differs")


def incomplete(store: LocalStore) -> Path:
    directory = publish(store, address())
    (directory / "manifest.json").unlink()
    return directory


LEFT: dict[str, tuple[Callable[[LocalStore], Path], float]] = {  # what, and from which age on it is garbage
    "staging": (staged, 0),
    "eviction": (half_evicted, 0),
    "incomplete entry": (incomplete, 0),
    "damaged entry": (aside, 7 * DAY),
    "canaries of no entry": (lambda store: write(store.root / "canaries" / KEY / "w").parent, DAY),
    "unsent canary of no entry": (lambda store: write(store.root / "remote" / f"unsent-{KEY}.w"), DAY),
    "half-written canary": (lambda store: write(store.root / "canaries" / KEY / f".w.{WRITER}"), DAY),
    "half-written canary of old": (lambda store: write(store.root / "canaries" / KEY / ".w.17"), DAY),
    "uses of no entry": (lambda store: write(store.root / "usage" / KEY), DAY),
    "lease of no entry": (lambda store: write(store.root / "leases" / f"{KEY}.lock"), DAY),
    "status of a lease of no entry": (lambda store: write(store.root / "leases" / f"{KEY}.json"), DAY),
    "half-written status": (lambda store: write(store.root / "leases" / f".{KEY}.json.{WRITER}"), DAY),
    "half-written status of old": (lambda store: write(store.root / "leases" / f"{KEY}.json.17"), DAY),
    "half-written outcome of old": (lambda store: write(store.root / "leases" / f"{KEY}.background.outcome.17"), DAY),
    "half-written breaker": (lambda store: write(store.root / "remote" / f".objects.json.{WRITER}"), DAY),
    "crash marker of no entry": (lambda store: write(store.root / "guards" / f"{KEY}.abc"), 7 * DAY),
    "half-written timing cache": (lambda store: write(store.root / "shared" / "timing" / f".a.cache.{WRITER}"), DAY),
    "half-written quarantine": (lambda store: write(store.root / "quarantine" / f".{KEY}-1.json.{WRITER}"), DAY),
    "half-written quarantine of old": (lambda store: write(store.root / "quarantine" / f".{KEY}-1.json.17"), DAY),
    "unreadable digests": (lambda store: write(store.root / "verified" / KEY), DAY),
}


@pytest.mark.parametrize("case", LEFT)
def test_everything_that_a_crash_leaves_is_collected_at_its_age(case: str, store: LocalStore) -> None:
    make, age = LEFT[case]
    path = make(store)
    now = time.time()
    if age:
        assert path not in [item.path for item in find_garbage(store.root, now + age - 600)]
    assert path in [item.path for item in find_garbage(store.root, now + age + 600)]
    assert path.exists()
    for item in find_garbage(store.root, now + age + 600):
        assert item.remove() is None
    assert not path.exists()
    assert find_garbage(store.root, now + age + 600) == []


def test_store_that_works_has_no_garbage(store: LocalStore) -> None:
    where = address()
    publish(store, where)
    store.write_canary(where, "w", {"cases": []})
    write(store.root / "remote" / f"unsent-{where.key.digest}.w")
    with store.lease(where, None) as lease, store.staging(address(device="other")):
        lease.report(phase="build")
        store.lookup(where)
        assert find_garbage(store.root, time.time() + 6 * DAY) == []
    assert isinstance(store.lookup(where), Hit)


def test_canary_records_of_a_key_are_bounded_and_the_used_ones_stay(store: LocalStore) -> None:
    where = address()
    publish(store, where)
    names = [f"w{number:03}" for number in range(CANARIES_PER_KEY + 3)]
    for age, name in enumerate(reversed(names)):
        assert store.write_canary(where, name, {"cases": []})
        path = store.root / "canaries" / where.key.digest / name
        os.utime(path, (time.time() - 60 * age - 60,) * 2)
    assert store.read_canary(where, "w001") == {"cases": []}  # the second oldest is used again
    report = make_room(store.root, Quotas(), Quotas())
    assert sorted(step.path.name for step in report.done) == ["w000", "w002", "w003"]
    assert store.canaries(where) == [name for name in names if name not in ("w000", "w002", "w003")]
    assert make_room(store.root, Quotas(), Quotas()).done == ()


def test_quarantines_and_pins_outlive_their_entries(store: LocalStore) -> None:
    kept = [write(store.root / "quarantine" / f"{KEY}-0123456789ab.json"), write(store.root / "pins" / KEY)]
    assert find_garbage(store.root, time.time() + 999 * DAY) == []
    assert all(path.exists() for path in kept)


def test_pins_that_cannot_be_read_hold(store: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    pins.pin(store.root, KEY, "a note")
    (store.root / "pins" / KEY).write_bytes(b"\xff")
    assert list(pins.pinned_keys(store.root)) == [KEY]
    (store.root / "pins").rename(store.root / "elsewhere")
    (store.root / "pins").symlink_to("pins")  # ELOOP: nobody can tell what is pinned
    assert pins.is_pinned(store.root, KEY)


def test_lease_that_somebody_holds_is_not_removed(store: LocalStore) -> None:
    where = address()
    lock = store.root / "leases" / f"{where.key.digest}.lock"
    later = time.time() + 2 * DAY
    with store.lease(where, None):
        assert find_garbage(store.root, later) == []
    (lease,) = [item for item in find_garbage(store.root, later) if item.path == lock]
    with store.lease(where, None):
        assert lease.remove() == "in use"
        assert lock.exists()
    assert lease.remove() is None
    with store.lease(where, None):
        assert lock.exists()


def test_staging_taken_between_finding_and_removing_stays(store: LocalStore) -> None:
    directory = staged(store)
    (item,) = find_garbage(store.root)
    descriptor = os.open(directory, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    assert item.remove() == "in use"
    assert (directory / "manifest.json").exists()
    os.close(descriptor)
    report = make_room(store.root, Quotas(), Quotas())
    assert [(step.path, step.refusal) for step in report.steps] == [(directory, None)]


def test_garbage_that_is_gone_meanwhile_counts_as_removed(store: LocalStore) -> None:
    for make, _ in LEFT.values():
        make(store)
    found = find_garbage(store.root, time.time() + 9 * DAY)
    assert len(found) >= 9
    for item in found:
        item.remove()
    assert [item.remove() for item in found] == [None] * len(found)

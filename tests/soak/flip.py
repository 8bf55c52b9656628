"""Every byte region of every file of a store flipped, truncated, zeroed, duplicated, swapped or grown; then a start.

Each trial has a copy of a store whose digests are remembered, changes one file of it in one way, with its modification
time put back in every second trial, and starts twice. The first start must not use what was changed; where it may
build, the second one must find everything in order again.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec

from tests.soak import forks
from tests.soak.subject import Subject, judge
from tests.soak.tally import Tally
from ts_handlers.guard.guard import Guard
from ts_handlers.guard.quarantine import write_record
from ts_handlers.guard.records import Quarantine
from ts_handlers.key.fingerprint import runtime_identity
from ts_handlers.store.entry import MANIFEST, Manifest, read_manifest
from ts_handlers.store.local.pins import pin
from ts_handlers.store.local.verified import RACY_SECONDS
from ts_handlers.store.remote.breaker import PAUSE_SECONDS
from ts_handlers.store.upkeep.audit import audit
from ts_handlers.system.processes import boot_id

BATCH = 40
Change = Callable[[Path], None]


@dataclasses.dataclass(frozen=True)
class Trial:
    """One change of one file, by its path below the store's root."""

    file: str
    name: str
    change: Change
    restore_mtime: bool


def prepare(subject: Subject, root: Path) -> Path:
    """A store with every kind of file that can lie in one; returns the entry's folder."""
    entry = subject.prepare(root)
    manifest, key = read_manifest(entry), entry.name
    pin(root, key, "soak")
    (root / "leases").mkdir(mode=0o700, exist_ok=True)
    (root / "leases" / f"{key}.json").write_text(json.dumps({"pid": 1, "started": time.time(), "phase": "build"}))
    (root / "remote").mkdir(mode=0o700, exist_ok=True)
    (root / "remote" / f"unsent-{key}").touch()
    state = {"boot": boot_id(), "until": time.monotonic() + PAUSE_SECONDS, "reason": "soak"}
    (root / "remote" / "0123456789abcdef.json").write_text(json.dumps(state))
    write_record(root, _record(key, manifest.digest, {"torch": "another"}))
    forks.call(functools.partial(_die_loading, root, key, manifest.digest))  # leaves a marker, which is forgiven
    assert any((root / "guards").iterdir())
    return entry


def _record(key: str, digest: str, runtime: dict[str, str]) -> Quarantine:
    return Quarantine(key, "model", "aot_inductor", "load", digest, runtime, "soak", time="2026-01-01T00:00:00Z")


def _die_loading(root: Path, key: str, digest: str) -> None:
    from tests.support.models import settings_of
    from ts_handlers.key.cache_key import CacheKey

    manifest = next(read_manifest(path.parent) for path in root.rglob(MANIFEST))
    cache_key = CacheKey(manifest.key)
    assert cache_key.digest == key
    with Guard(root, settings_of(), cache_key, "model", lambda: "").marked("load", digest):
        os.kill(os.getpid(), signal.SIGKILL)


def changes(path: Path, regions: int, rng: random.Random) -> Iterator[tuple[str, Change]]:
    """Changes of one file, such that each of its bytes lies in a region that is changed."""
    size = path.stat().st_size
    count = max(1, min(regions, size))
    for index in range(count if size else 0):
        start, end = index * size // count, (index + 1) * size // count
        at = f"bytes {start} to {end}"
        yield f"flip {at}", _edit(_flipped, start, end, rng.randrange(8))
        yield f"truncate {at}", _edit(lambda data, a, b: data[:a], start, end)
        yield f"cut out {at}", _edit(lambda data, a, b: data[:a] + data[b:], start, end)
        yield f"zero {at}", _edit(lambda data, a, b: data[:a] + bytes(b - a) + data[b:], start, end)
        yield f"duplicate {at}", _edit(lambda data, a, b: data[:b] + data[a:], start, end)
        bits = 1 << rng.randrange(8)
        position = rng.randrange(start, end)
        yield f"flip bit {bits} of byte {position}", _edit(_flip_bit, position, bits)
    yield "grow", _edit(lambda data: data + b"\n")
    yield "grow a lot", _edit(lambda data: data + bytes(1 << 16))
    yield "double", _edit(lambda data: data + data)
    yield "empty", _edit(lambda data: b"")
    yield "not UTF-8", _edit(lambda data: b"\xff\xfe" * max(1, len(data) // 2))
    yield "deeply nested", _edit(lambda data: b'{"artifact":{"a":' + b"[" * 50_000 + b"]" * 50_000 + b"}}")
    yield "remove", lambda path: path.unlink()
    yield "replace by a folder", _replace_by_folder
    yield "replace by a dangling link", _replace_by_link
    yield "mode 000", lambda path: path.chmod(0)


def _edit(function: Callable[..., bytes], *arguments: int) -> Change:
    def change(path: Path) -> None:
        data = path.read_bytes()
        with open(path, "r+b") as file:  # in place: the inode stays
            file.write(function(data, *arguments))
            file.truncate()

    return change


def _flipped(data: bytes, start: int, end: int, bit: int) -> bytes:
    return data[:start] + bytes(byte ^ (1 << bit) for byte in data[start:end]) + data[end:]


def _flip_bit(data: bytes, position: int, bits: int) -> bytes:
    return data[:position] + bytes([data[position] ^ bits]) + data[position + 1 :]


def _replace_by_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _replace_by_link(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.with_name("nothing"))


def _swap(other: str, root_of: Callable[[Path], Path], path: Path) -> None:
    """Exchange the bytes of two files, in place."""
    second = root_of(path) / other
    ours, theirs = path.read_bytes(), second.read_bytes()
    path.write_bytes(theirs)
    second.write_bytes(ours)


def _swaps(root: Path, files: list[str]) -> Iterator[tuple[str, str, Change]]:
    for index, name in enumerate(files):
        other = files[(index + 1) % len(files)]
        depth = len(Path(name).parts)
        yield name, f"swap with {other}", functools.partial(_swap, other, lambda path, d=depth: path.parents[d - 1])
    canaries = [name for name in files if name.startswith("canaries/")]
    if len(canaries) == 2:
        yield canaries[0], "swap canaries", functools.partial(_swap, canaries[1], lambda path: path.parents[2])


def trials(root: Path, regions: int, rng: random.Random) -> list[Trial]:
    """Every trial on a store, in a random order."""
    files = sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file())
    found = [(name, what, change) for name in files for what, change in changes(root / name, regions, rng)]
    found += _swaps(root, files)
    rng.shuffle(found)
    return [Trial(name, what, change, bool(index % 2)) for index, (name, what, change) in enumerate(found)]


def run(tally: Tally, folder: Path, seed: int, *, real: bool, regions: int, limit: int | None = None) -> None:
    """Do the trials on one subject, at most `limit` of them."""
    subject, rng = Subject(folder / "subject", real=real), random.Random(seed)
    master = folder / "master"
    entry = prepare(subject, master).relative_to(master)
    todo = trials(master, regions, rng)[:limit]
    for begin in range(0, len(todo), BATCH):
        batch = todo[begin : begin + BATCH]
        roots = [folder / f"store-{index}" for index in range(len(batch))]
        for root in roots:
            shutil.copytree(master, root)
        time.sleep(RACY_SECONDS + 0.1)  # digests of younger files are not remembered
        for root, trial in zip(roots, batch, strict=True):
            list(audit(root))
            assert any((root / "verified").iterdir())
            _one(tally, subject, root, entry, trial, seed)
            shutil.rmtree(root)
    _weights(tally, subject, master, folder)


def _one(tally: Tally, subject: Subject, root: Path, entry: Path, trial: Trial, seed: int) -> None:
    what = f"flip seed {seed}: {trial.file}: {trial.name}{', time restored' if trial.restore_mtime else ''}"
    path, before = root / trial.file, _contents(root / entry)
    status = path.stat()
    trial.change(path)
    if trial.restore_mtime and path.is_file():
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    miss = {"on_miss": "eager"} if subject.real else {}
    may_serve = _may_serve(root / entry, before)
    result = forks.call(lambda: subject.start(root, **miss))
    judge(tally, what, result, may_serve=may_serve)
    if subject.real or result[0] != 0:
        return
    code, facts, text = forks.call(lambda: subject.start(root))
    if code != 0 or not facts["right"] or (facts["result"] != "hit" and "mode 000" not in trial.name):
        tally.note("stuck", f"{what}: the second start: {facts or text}; the first: {result[1]}")


def _contents(entry: Path) -> dict[str, bytes]:
    return {path.relative_to(entry).as_posix(): path.read_bytes() for path in entry.rglob("*") if path.is_file()}


def _may_serve(entry: Path, before: dict[str, bytes]) -> bool:
    """Whether the entry's files are what they were, and its manifest says what it said, in whatever JSON."""
    try:
        now = _contents(entry)
        same = read_manifest(entry) == msgspec.json.decode(before[MANIFEST], type=Manifest)
    except (OSError, ValueError, RecursionError):
        return False
    return same and {**now, MANIFEST: b""} == {**before, MANIFEST: b""}


def _weights(tally: Tally, subject: Subject, master: Path, folder: Path) -> None:
    """The archive's weights changed in place, their modification time put back: the new ones must answer."""
    root, weights, other = folder / "store-weights", subject.archive / "model.pt", subject.other / "model.pt"
    shutil.copytree(master, root)
    kept = weights.read_bytes()
    time.sleep(RACY_SECONDS + 0.1)
    forks.call(lambda: subject.start(root))
    status = weights.stat()
    try:
        weights.write_bytes(other.read_bytes())
        os.utime(weights, ns=(status.st_atime_ns, status.st_mtime_ns))
        answers = subject.answers["archive"]
        subject.answers["archive"] = subject.answers["other"]
        judge(tally, "weights changed in place", forks.call(lambda: subject.start(root)), may_serve=True)
        subject.answers["archive"] = answers
    finally:
        weights.write_bytes(kept)
        shutil.rmtree(root)


def quarantined(tally: Tally, folder: Path, seed: int, *, regions: int) -> None:
    """Changes of the record that keeps an entry from being tried."""
    subject, rng = Subject(folder / "subject", real=False), random.Random(seed)
    master = folder / "master"
    entry = subject.prepare(master)
    digest, key = read_manifest(entry).digest, entry.name
    write_record(master, _record(key, digest, runtime_identity()))
    for trial in trials(master, regions, rng):
        if not trial.file.startswith("quarantine/"):
            continue
        root = folder / "store"
        shutil.copytree(master, root)
        trial.change(root / trial.file)
        judge(tally, f"quarantine: {trial.name}", forks.call(lambda: subject.start(root)), may_serve=True)  # noqa: B023
        shutil.rmtree(root)

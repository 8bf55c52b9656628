"""Writers, readers, evictions and repairs on one store, killed and stopped at random; then the log is examined.

Each trial is the life of one process: a worker that looks up or builds a few entries, a whole start, a `make_room`, an
`audit` that repairs, or a process that damages an entry which nobody reads. What they do is proven afterwards from
their log, see `soak.race_log`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import logging
import os
import random
import shutil
import signal
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.soak import forks
from tests.soak.race_log import HEARTBEAT, examine
from tests.soak.subject import Subject
from tests.soak.tally import Tally
from tests.support import entries, file_backend
from tests.support.models import settings_of
from ts_handlers.errors import StoreError
from ts_handlers.metrics import Metrics
from ts_handlers.store.address import Address
from ts_handlers.store.base import Hit
from ts_handlers.store.entry import Manifest, list_files
from ts_handlers.store.local.store import LocalStore
from ts_handlers.store.local.usage import exclusive
from ts_handlers.store.opening import open_store
from ts_handlers.store.remote.lease import LOST_AFTER
from ts_handlers.store.upkeep import eviction
from ts_handlers.store.upkeep.audit import audit
from ts_handlers.store.upkeep.eviction import Quotas
from ts_handlers.store.upkeep.scan import scan_entries
from ts_handlers.store.upkeep.space import make_room

LIMIT_SECONDS = 60.0  # a life that takes longer hangs
KEYS = 3  # in use at a time
NEW_KEY_EVERY = 12  # lives, so that there is always something to build
SIZE = 20_000
KINDS = {"worker": 60, "start": 10, "room": 12, "audit": 10, "damage": 8}
logger = logging.getLogger(__name__)


@dataclasses.dataclass
class World:
    """One round: hosts with a store each, what they share, and the log of what happens."""

    hosts: list[Path]
    remote: Path | None
    log: Path
    subject: Subject
    newest: int = 0

    def store(self, host: Path) -> Any:
        """The store of a host as a start opens it."""
        if self.remote is None:
            return LocalStore(host / "store")
        return open_store(settings_of(**self.section(host)), Metrics())[0]

    def section(self, host: Path) -> dict[str, Any]:
        """Settings of a host."""
        found: dict[str, Any] = {"store": str(host / "store"), "guard": {"load_seconds": None}}
        if self.remote is not None:
            found["remote"] = {"url": str(self.remote), "timeout_seconds": 30, "heartbeat_seconds": HEARTBEAT}
        return found


class Log:
    """Appends events; one write each, so that lines of processes do not mix and a kill leaves none in half."""

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    def write(self, event: str, **facts: Any) -> None:
        """Log an event now."""
        line = json.dumps({"event": event, "at": time.monotonic(), "pid": os.getpid(), **facts})
        os.write(self._descriptor, line.encode() + b"\n")


def address(number: int) -> Address:
    """One of the keys of a round."""
    return entries.address(device=f"cpu-{number}")


def content(key: str) -> bytes:
    """What the artifact of a key must hold."""
    return hashlib.sha512(key.encode()).digest() * (SIZE // 64)


def build(world: World, log: Log, store: Any, host: Path, where: Address, rng: random.Random) -> None:
    """A worker's way on a miss."""
    key = where.key.digest
    with store.lease(where, None) as lease:
        if isinstance(store.lookup(where), Hit):
            return
        nonce = uuid.uuid4().hex
        alone = any("alone" in note or "not sent" in note for note in store.notes)
        log.write("begin", key=key, nonce=nonce, host=host.name, alone=alone)
        with store.staging(where) as staging:
            (staging / "code").mkdir()
            data = content(key)
            with open(staging / "code" / "artifact", "wb", buffering=0) as file:
                for offset in range(0, len(data), 5_000):
                    file.write(data[offset : offset + 5_000])
                    time.sleep(rng.random() * 0.004)
            (staging / "nonce").write_text(nonce)
            lease.report(phase="publish")
            manifest = Manifest(
                where.key["format"], where.key.parts, where.key["backend"], {}, list_files(staging), {}, {"build": 1.0}
            )
            store.write_canary(where, "w", {"cases": [], "key": key})
            log.write("end", key=key, nonce=nonce)
            try:
                directory = store.publish(where, staging, manifest)
            except StoreError as error:
                log.write("unpublished", key=key, reason=str(error))
                return
            log.write("published", key=key, nonce=(directory / "nonce").read_text(), host=host.name)


def read(log: Log, found: Hit, where: Address) -> None:
    """Read everything of a hit, as loading does."""
    key = where.key.digest
    try:
        data = (found.directory / "code" / "artifact").read_bytes()
        nonce = (found.directory / "nonce").read_text()
    except OSError as error:
        log.write("partial", key=key, reason=str(error))
        return
    if len(data) != len(content(key)) or len(nonce) != 32:
        log.write("partial", key=key, reason=f"{len(data)} bytes, nonce {nonce!r}")
    elif data != content(key):
        log.write("wrong", key=key)


def worker(world: World, log: Log, host: Path, rng: random.Random) -> None:
    """Look up or build a few entries, each as a start of its own would."""
    for _ in range(rng.randint(1, 5)):
        where = address(world.newest + rng.randrange(KEYS))
        store, began = world.store(host), time.monotonic()
        found = store.lookup(where)
        ended, kind = time.monotonic(), type(found).__name__
        nonce = (found.directory / "nonce").read_text() if isinstance(found, Hit) else None
        log.write("lookup", key=where.key.digest, began=began, ended=ended, found=kind, nonce=nonce, host=host.name)
        if isinstance(found, Hit):
            read(log, found, where)
        else:
            build(world, log, store, host, where, rng)
        record = store.read_canary(where, "w")
        if record is not None and record["key"] != where.key.digest:
            log.write("wrong", key=where.key.digest, what="canary")
        store.write_back.wait()
        del store, found


def start(world: World, log: Log, host: Path, rng: random.Random) -> None:
    """A whole start, whose builds are logged too."""
    weights = rng.choice(["archive", "other"])

    def log_line(text: str) -> None:
        if text in ("begin", "end"):
            log.write(text, key="start", nonce=f"start-{os.getpid()}", host=host.name, alone=False)

    file_backend.log_line = log_line
    section = world.section(host)
    section.pop("store")
    facts = world.subject.start(host / "store", weights, **section)
    log.write("started", **facts)


def room(world: World, log: Log, host: Path, rng: random.Random) -> None:
    """Evict down to a random number of entries, again and again."""
    evict = eviction.evict

    def logged(root: Path, planned: eviction.Eviction) -> str | None:
        # Whatever stands there when it is removed.
        log.write("evict", key=planned.candidate.key, host=host.name)
        refusal = evict(root, planned)
        log.write("done", key=planned.candidate.key, refusal=refusal)
        return refusal

    import ts_handlers.store.upkeep.space

    ts_handlers.store.upkeep.space.evict = logged
    for _ in range(rng.randint(1, 4)):
        make_room(host / "store", Quotas(entries=rng.randint(0, KEYS + 1)), Quotas())


def repair(world: World, log: Log, host: Path, rng: random.Random) -> None:
    """Check everything and move aside what is damaged."""
    for _ in range(rng.randint(1, 3)):
        list(audit(host / "store", repair=True))


def damage(world: World, log: Log, host: Path, rng: random.Random) -> None:
    """Change a file of an entry that nobody reads: readers have no defence after they have verified."""
    infos = scan_entries(host / "store")
    if not infos:
        return
    directory = rng.choice(infos).directory
    with contextlib.suppress(OSError), exclusive(directory) as refusal:
        if refusal is None:
            log.write("damage", key=directory.name, host=host.name)
            path = rng.choice([path for path in directory.rglob("*") if path.is_file()])
            action = rng.randrange(4)
            if action == 0:
                path.unlink()
            else:
                data = path.read_bytes()
                path.write_bytes([data[: len(data) // 2], bytes(len(data)), data + b"x"][action - 1])
            log.write("done", key=directory.name, refusal=None)


LIVES: dict[str, Callable[[World, Log, Path, random.Random], None]] = {
    "worker": worker,
    "start": start,
    "room": room,
    "audit": repair,
    "damage": damage,
}


def live(world: World, kind: str, number: int, seed: int) -> None:
    """One life, in a process of its own."""
    rng, log = random.Random(f"{seed}/{number}"), Log(world.log)
    host = world.hosts[rng.randrange(len(world.hosts))]
    world.newest = number // NEW_KEY_EVERY
    os.environ["TMPDIR"] = str(host)
    logging.disable(logging.CRITICAL)
    LIVES[kind](world, log, host, rng)


def round_of(tally: Tally, folder: Path, subject: Subject, seed: int, lives: int, hosts: int, width: int) -> None:
    """A number of lives on fresh stores, `width` at once, and the examination."""
    world = World([folder / f"host-{index}" for index in range(hosts)], None, folder / "log", subject)
    if hosts > 1:
        world.remote = folder / "remote"
        world.remote.mkdir(parents=True)
    for host in world.hosts:
        (host / "store").mkdir(mode=0o700, parents=True)
    rng, log, running = random.Random(seed), Log(world.log), dict[int, _Life]()
    deadly = 0.12 if hosts == 1 else 0.03  # whoever waits for a dead host waits for three heartbeats
    try:
        for number in range(lives):
            while len(running) >= width:
                _disturb(running, log, rng, deadly, hosts)
                _reap(tally, running, log)
            _begin(running, world, folder, rng, seed, number)
        while running:
            _disturb(running, log, rng, 0.0, hosts)
            _reap(tally, running, log)
    finally:
        for child in running:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
    examine(
        tally,
        [json.loads(line) for line in world.log.read_text().splitlines()],
        world.hosts,
        f"race seed {seed}, hosts {hosts}",
    )


def _begin(running: dict[int, _Life], world: World, folder: Path, rng: random.Random, seed: int, number: int) -> None:
    (kind,) = rng.choices(list(KINDS), list(KINDS.values()))
    errors = folder / f"stderr-{number}"
    errors.touch()
    child, pipe = forks.fork(functools.partial(live, world, kind, number, seed), errors)
    what = f"race seed {seed}, hosts {len(world.hosts)}, life {number} ({kind})"
    running[child] = _Life(what, errors, pipe, time.monotonic())


@dataclasses.dataclass
class _Life:
    what: str
    stderr: Path
    pipe: int
    began: float
    killed: bool = False


def _disturb(running: dict[int, _Life], log: Log, rng: random.Random, deadly: float, hosts: int) -> None:
    """Kill or stop somebody, perhaps."""
    time.sleep(rng.random() * 0.01)
    chosen = rng.choice(list(running)) if running else None
    if chosen is None:
        return
    chance = rng.random()
    if chance < deadly:
        log.write("kill", who=chosen)
        running[chosen].killed = True
        os.kill(chosen, signal.SIGKILL)
    elif chance < deadly + 0.12:
        log.write("stop", who=chosen)
        os.kill(chosen, signal.SIGSTOP)
        # Now and then for longer than a lease lasts.
        time.sleep(LOST_AFTER * HEARTBEAT * 1.5 if hosts > 1 and rng.random() < 0.003 else rng.random() * 0.03)
        os.kill(chosen, signal.SIGCONT)
        log.write("continue", who=chosen)


def _reap(tally: Tally, running: dict[int, _Life], log: Log) -> None:
    for child, life in list(running.items()):
        if time.monotonic() - life.began > LIMIT_SECONDS and not life.killed:
            tally.note("stuck", f"{life.what}: still running after {LIMIT_SECONDS:g} s")
            life.killed = True
            os.kill(child, signal.SIGKILL)
        pid, status = os.waitpid(child, os.WNOHANG)
        if not pid:
            continue
        log.write("dead", who=child)
        code, text = os.waitstatus_to_exitcode(status), life.stderr.read_text(errors="replace")[-1500:]
        os.close(life.pipe)
        del running[child]
        if code == 0 or (code == -signal.SIGKILL and life.killed):
            tally.trial("killed" if code else "ended")
        else:
            tally.trial("crash" if code < 0 else "escaped", f"{life.what}: {code}: {text}")


def run(
    tally: Tally, folder: Path, seed: int, trials: int, *, hosts: int = 1, lives: int = 150, width: int = 6
) -> None:
    """Rounds until there are enough trials."""
    subject = Subject(folder / "subject", real=False)
    rounds = 0
    before = tally.trials
    while tally.trials - before < trials:
        place = folder / f"round-{rounds}"
        place.mkdir()
        round_of(tally, place, subject, seed + rounds, min(lives, trials - tally.trials + before), hosts, width)
        if tally.clean:
            shutil.rmtree(place)
        rounds += 1

"""The n-th system call on the store fails, is cut short, or is the last one of the process; and wrong clocks.

`faults.c`, preloaded, counts the calls of an operation on the store's files and then fails one of them, or all from one
on, in a process of its own for each. Afterwards, with a disk that works again, a start must find everything in order: a
good entry lies where it lay and is a hit, here and in the remote store, and nothing is held against it or its build.
"""

from __future__ import annotations

import ctypes
import dataclasses
import errno
import functools
import os
import random
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from tests.soak import forks
from tests.soak.subject import EXPECTED, Subject
from tests.soak.tally import Tally
from ts_handlers.errors import RefusedError, StoreError
from ts_handlers.guard.failures import CIRCUMSTANTIAL
from ts_handlers.guard.quarantine import record_files
from ts_handlers.guard.records import FailedBuild
from ts_handlers.store import bundles
from ts_handlers.store.local.store import LocalStore
from ts_handlers.store.remote.signing import Keyring
from ts_handlers.store.upkeep.audit import audit
from ts_handlers.store.upkeep.eviction import Quotas
from ts_handlers.store.upkeep.scan import scan_entries
from ts_handlers.store.upkeep.space import make_room, wait_for_room
from ts_handlers.system.files import RememberingWriter

KILL = -1
OF_A_DISK = ("OSError", "PermissionError", "BuildError", "DiskFullError")
EVERY, CHANGES, OPENS, WRITES = range(4)
DAY = 86400.0
SKEWS = (-3650 * DAY, -30 * DAY, -DAY, -3600.0, -3.0, 3.0, 3600.0, DAY + 60, 8 * DAY, 3650 * DAY)


@dataclasses.dataclass(frozen=True)
class Fault:
    """What happens at one call, or (`lasting`) at every call from one on."""

    name: str
    mode: int
    error: int
    lasting: bool


FAULTS = (
    Fault("EIO", EVERY, errno.EIO, False),
    Fault("EIO from then on", EVERY, errno.EIO, True),
    Fault("ENOSPC", CHANGES, errno.ENOSPC, False),
    Fault("ENOSPC from then on", CHANGES, errno.ENOSPC, True),
    Fault("EROFS from then on", CHANGES, errno.EROFS, True),
    Fault("EMFILE", OPENS, errno.EMFILE, False),
    Fault("EMFILE from then on", OPENS, errno.EMFILE, True),
    Fault("EACCES from then on", EVERY, errno.EACCES, True),
    Fault("short write", WRITES, 0, False),
    Fault("SIGKILL", EVERY, KILL, False),
)


def build_library(folder: Path) -> Path:
    """Compile faults.c."""
    library = folder / "faults.so"
    source = Path(__file__).with_name("faults.c")
    subprocess.run(["gcc", "-shared", "-fPIC", "-O1", "-o", str(library), str(source), "-ldl"], check=True)
    return library


def is_preloaded() -> bool:
    """Whether this process can make faults."""
    return hasattr(ctypes.CDLL(None), "soak_arm")


class _Injected:
    """The preloaded library."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL(None)
        self._library.soak_clock.argtypes = [ctypes.c_double]

    def arm(self, root: Path, fault: Fault, index: int) -> None:
        self._library.soak_arm(
            os.fsencode(root), os.fsencode(os.environ["TMPDIR"]), fault.mode, index, fault.error, int(fault.lasting)
        )

    def disarm(self) -> int:
        return int(self._library.soak_disarm())

    def clock(self, seconds: float) -> None:
        self._library.soak_clock(seconds)


class Operations:
    """What is done to a store, by name; each leaves facts as `Subject.start` does, or None."""

    def __init__(self, subject: Subject, folder: Path) -> None:
        self.subject = subject
        self.empty, self.filled = folder / "empty", folder / "filled"
        self.damaged, self.remote = folder / "damaged", folder / "remote"
        self.empty.mkdir(mode=0o700)
        entry = subject.prepare(self.filled)
        shutil.copytree(self.filled, self.damaged)
        path = next(path for path in (self.damaged / entry.relative_to(self.filled)).rglob("*.json"))
        path.write_bytes(path.read_bytes()[:-1] + b"?")
        self.remote.mkdir()
        code, _, text = forks.call(functools.partial(self._start, folder / "sender" / "store", remote=True))
        assert code == 0, text
        shutil.rmtree(folder / "sender")
        store = LocalStore(self.filled)
        bundles.export_bundle(store, scan_entries(self.filled), folder / "bundle", Keyring())
        self.bundle = folder / "bundle"

    def _start(self, root: Path, remote: bool = False) -> dict[str, Any]:
        section = {"remote": {"url": str(self.remote), "timeout_seconds": 20}} if remote else {}
        facts = self.subject.start(root, **section)
        wait_for_room()
        return facts

    def _import(self, root: Path) -> None:
        try:
            bundles.import_bundle(LocalStore(root), self.bundle, Keyring())
        except (StoreError, OSError, RefusedError):
            return

    def _tidy(self, root: Path) -> None:
        try:
            make_room(root, Quotas(entries=0), Quotas())
        except OSError:
            return

    def _repair(self, root: Path) -> None:
        list(audit(root, repair=True))

    def _package(self, root: Path) -> None:
        """What a compiler's package is written by: torch's writer of archives, which an error of its file would end."""
        try:
            with tempfile.TemporaryDirectory() as folder, RememberingWriter(Path(folder, "package")) as file:
                torch.save({f"weight {number}": torch.ones(20, 50) for number in range(8)}, file)
                file.check()
        except OSError:
            return

    def objects(self) -> list[str]:
        """Entries and canary records in the remote store."""
        found = [path for kind in ("entries", "canaries") for path in (self.remote / kind).rglob("*")]
        return sorted(path.relative_to(self.remote).as_posix() for path in found if path.is_file())

    def all(self) -> dict[str, tuple[Path, Callable[[Path], Any]]]:
        """Each operation, with the store that it is done on."""
        return {
            "build": (self.empty, self._start),
            "hit": (self.filled, self._start),
            "rebuild": (self.damaged, self._start),
            "fetch": (self.empty, functools.partial(self._start, remote=True)),
            "evict": (self.filled, self._tidy),
            "repair": (self.damaged, self._repair),
            "import": (self.empty, self._import),
            "package": (self.empty, self._package),
        }


def run(tally: Tally, folder: Path, seed: int, trials: int) -> None:
    """Every operation with every fault at every call, or a random choice of so many."""
    injected, operations = _Injected(), Operations(Subject(folder / "subject", real=False), folder)
    todo = list(_all(injected, operations, folder))
    random.Random(seed).shuffle(todo)
    for name, fault, index in todo[:trials]:
        _one(tally, injected, operations, folder, name, fault, index)


def _all(injected: _Injected, operations: Operations, folder: Path) -> Iterator[tuple[str, Fault, int]]:
    for name, (start, operation) in operations.all().items():
        counts = {}
        for mode in (EVERY, CHANGES, OPENS, WRITES):
            root = _copy(start, folder)

            def count(root: Path = root, operation: Callable[[Path], Any] = operation, mode: int = mode) -> int:
                injected.arm(root, Fault("", mode, 0, False), -1)
                operation(root)
                return injected.disarm()

            code, counts[mode], text = forks.call(count)
            assert code == 0, text
        for fault in FAULTS:
            yield from ((name, fault, index) for index in range(counts[fault.mode]))


def _copy(start: Path, folder: Path) -> Path:
    root = folder / "store"
    shutil.rmtree(root, ignore_errors=True)
    shutil.copytree(start, root)
    return root


def _one(
    tally: Tally, injected: _Injected, operations: Operations, folder: Path, name: str, fault: Fault, index: int
) -> None:
    start, operation = operations.all()[name]
    root = _copy(start, folder)
    what = f"faults: {name}: {fault.name} at call {index}"
    entries, objects = _entries(root), operations.objects()

    def work() -> Any:
        injected.arm(root, fault, index)
        try:
            return operation(root)
        finally:
            injected.disarm()

    code, facts, text = forks.call(work)
    if code == 0:
        _judge(tally, what, facts)
    elif code == -9 and fault.error == KILL:
        tally.trial("killed")
    elif code < 0:
        tally.trial("crash", f"{what}: signal {-code}: {text[-1500:]}")
    else:
        tally.trial("escaped", f"{what}: {text[-2500:]}")
    if name == "hit":
        if _entries(root) != entries:
            tally.note("lost", f"{what}: the entry does not lie where it lay: {facts}")
        elif facts is not None and facts["result"] == "built":
            tally.note("lost", f"{what}: built although the entry is there: {facts}")
    if not set(objects) <= set(operations.objects()):
        tally.note("lost", f"{what}: {objects} lay in the remote store, now {operations.objects()}")
    for path, record in record_files(root):
        if not isinstance(record, FailedBuild) or record.kind != CIRCUMSTANTIAL:
            tally.note("blamed", f"{what}: {record}")
            path.unlink()
    _afterwards(tally, operations, root, what, ("hit",) if name == "hit" else ("hit", "built"))


def _entries(root: Path) -> dict[str, int]:
    """The entries that lie in a store, with what tells each from one that was built in its place."""
    return {info.key: info.directory.stat().st_ino for info in scan_entries(root)}


def _judge(tally: Tally, what: str, facts: dict[str, Any] | None) -> None:
    if facts is None:
        tally.trial("ended")
        return
    outcome = {"hit": "served", "waited": "served", "built": "rebuild"}.get(facts["result"], "refusal")
    reasons = [reason.split(":")[0] for reason in facts["fallbacks"]]
    if not facts["right"]:
        outcome = "wrong"
    elif any(reason not in (*EXPECTED, *OF_A_DISK) and not reason.startswith("the store ") for reason in reasons):
        outcome = "escaped"
    tally.trial(outcome, f"{what}: {facts}")


def _afterwards(
    tally: Tally, operations: Operations, root: Path, what: str, first: tuple[str, ...] = ("hit", "built")
) -> None:
    """The disk works again, the clock is right: a start ends as `first` says, the next one hits, nothing is left over.

    A build that met the fault is held back for a minute, which is over here; for a fault no build is held for longer.
    """
    for path, record in record_files(root):
        if record.kind == CIRCUMSTANTIAL:
            path.unlink()
    for expected in (first, ("hit",)):
        code, facts, text = forks.call(lambda: operations.subject.start(root))
        if code or not facts["right"] or facts["result"] not in expected:
            lost = not code and facts["result"] == "built"
            tally.note("lost" if lost else "stuck", f"{what}, then a start: {facts or text}")
            return
    for finding in audit(root):
        if finding.problem is not None:
            tally.note("stuck", f"{what}, then: {finding}")
    make_room(root, Quotas(), Quotas())
    left = list((root / "staging").glob("*")) if (root / "staging").exists() else []
    if left or len(scan_entries(root)) != 1:
        tally.note("stuck", f"{what}, then left: {left}, {len(scan_entries(root))} entries")


def clocks(tally: Tally, folder: Path, seed: int, trials: int) -> None:
    """Every operation with a clock that is wrong, or with files that are of the future or of the past."""
    injected, operations = _Injected(), Operations(Subject(folder / "subject", real=False), folder)
    todo = [(name, skew, files) for name in operations.all() for skew in SKEWS for files in (False, True)]
    random.Random(seed).shuffle(todo)
    for name, skew, files in todo[:trials]:
        start, operation = operations.all()[name]
        root = _copy(start, folder)
        what = f"clock: {name}, {'files' if files else 'process'} {skew:+g} s"
        code, facts, text = forks.call(functools.partial(_at, injected, root, skew, files, operation))
        if code:
            tally.trial("crash" if code < 0 else "escaped", f"{what}: {text[-2500:]}")
            continue
        _judge(tally, what, facts)
        if facts is not None and facts["result"] == "eager":
            tally.note("stuck", f"{what}: {facts}")
        if name == "hit" and facts["result"] != "hit":
            tally.note("lost", f"{what}: {facts}")
        _afterwards(tally, operations, root, what)


def _at(injected: _Injected, root: Path, skew: float, files: bool, operation: Callable[[Path], Any]) -> Any:
    if files:
        _shift(root, skew)
    else:
        injected.clock(skew)
    return operation(root)


def _shift(root: Path, seconds: float) -> None:
    for path in root.rglob("*"):
        status = path.stat()
        os.utime(path, (status.st_atime + seconds, max(0.0, status.st_mtime + seconds)))

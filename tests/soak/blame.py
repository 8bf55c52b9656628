"""Processes of one host that die in every way, and whether the crash guard blames as it should.

A trial is a history of some events on a fresh store: workers begin, end well, crash, are killed or asked to end; the
kernel kills for lack of memory, them or somebody else; the machine or the container starts again; clocks jump; disks
fill. The guard and `soak.blame_oracle` are asked at each beginning and at the end what may be tried. Nothing dies
really: a dead process is a marker whose lock is free. Every fourth trial judges the end of a model's process instead.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import random
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.soak.blame_oracle import ASKED, CRASH, DAY, ELSEWHERE, MINUTE, SILENT, TIMEOUT, Attempt, Oracle, Work, World
from tests.soak.blame_oracle import is_evidence as oracle_is_evidence
from tests.soak.tally import Tally
from ts_handlers import Settings
from ts_handlers.errors import FailedBeforeError, QuarantinedError
from ts_handlers.guard import guard as guard_module
from ts_handlers.guard import markers as markers_module
from ts_handlers.guard.guard import Guard
from ts_handlers.guard.quarantine import lift_quarantine
from ts_handlers.key.cache_key import CacheKey
from ts_handlers.model_process import blame as call_blame
from ts_handlers.model_process.folder import Folder, Holder

KEYS = {key.digest: key for key in (CacheKey((("format", "1"), ("backend", name))) for name in ("one", "two"))}
WORKS: list[Work] = [(key, phase, digest) for key in KEYS for phase, digest in (("load", "aa"), ("load", "bb"))]
WORKS += [(key, "build", "") for key in KEYS]
WELL, RAISES = "ends well", "raises"
FATES = {WELL: 4, RAISES: 1, CRASH: 2, TIMEOUT: 1, ASKED: 2, SILENT: 6, ELSEWHERE: 2}
TRUE_NOW = 1_790_000_000.0


def _report(how: str, rng: random.Random) -> str:
    """What `faulthandler` writes."""
    thread, other = threading.get_ident(), threading.get_ident() + rng.choice([1, 4096])
    stack = '  File "model.py", line 3 in forward\n'
    fatal = f"Fatal Python error: {rng.choice(['Segmentation fault', 'Aborted', 'Bus error'])}\n\n"
    return {
        CRASH: f"{fatal}Current thread 0x{thread:016x} (most recent call first):\n{stack}",
        ELSEWHERE: f"{fatal}Thread 0x{thread:016x} (most recent call first):\n{stack}\n"
        f"Current thread 0x{other:016x} (most recent call first):\n{stack}",
        TIMEOUT: f"Timeout (0:02:00)!\nThread 0x{thread:016x} (most recent call first):\n{stack}",
        ASKED: f"Current thread 0x{thread:016x} (most recent call first):\n{stack}",
    }.get(how, "")


@dataclasses.dataclass(eq=False)
class _Worker:
    """A process that lives: what ends its marker, its fate, and what the oracle keeps of it."""

    end: Callable[[], Any]
    fate: str
    attempt: Attempt
    path: Path | None


class History:
    """One trial."""

    def __init__(self, tally: Tally, root: Path, rng: random.Random, what: str) -> None:
        self._tally, self._root, self._rng, self._what = tally, root, rng, what
        counted = rng.random() < 0.9  # some hosts have no count of the kernel's kills
        self.world = World(TRUE_NOW, group="group 0" if counted else "", kills=rng.randint(0, 3) if counted else None)
        self._oracle = Oracle()
        self._living: list[_Worker] = []
        self.log: list[str] = []
        self.agreed = True

    def run(self) -> None:
        """Let things happen, and compare."""
        events = {
            self._begin: 8,
            self._end: 9,
            self._wait: 4,
            self._stranger: 3,
            self._reboot: 1,
            self._new_container: 1,
            self._clock_jumps: 1,
            self._disk: 2,
            self._torn_marker: 1,
            self._lift: 0.4,
        }
        for event in self._rng.choices(list(events), list(events.values()), k=self._rng.randint(4, 24)):
            event()
            if not self.agreed:
                return
        self.compare(*WORKS)

    def close(self) -> None:
        """Let go of what lives."""
        for worker in self._living:
            with contextlib.suppress(OSError):
                worker.end()

    def compare(self, *works: Work) -> list[bool]:
        """Ask the guard and the oracle whether something may be tried; what they agree on."""
        free = []
        for work in works:
            expected = self._oracle.refuses(work, self.world)
            found = self._refusal(self._guard(work), work)
            if found != expected:
                self.agreed = False
                wrong = f"{self._what}: {work}: expected {expected or 'free'}, found {found or 'free'}"
                self._tally.note("blamed" if found else "forgotten", f"{wrong}: {'; '.join(self.log)}")
                return []
            self._tally.note("refusal" if found else "served")
            free.append(not found)
        return free

    def _guard(self, work: Work) -> Guard:
        return Guard(self._root, Settings(), KEYS[work[0]], "model", lambda: "w")

    def _refusal(self, guard: Guard, work: Work) -> str:
        try:
            guard.refuse(work[2])
        except QuarantinedError:
            return "quarantined"
        except FailedBeforeError:
            return "failed"
        return ""

    def _begin(self) -> None:
        """One to three workers begin with the same; builds begin one at a time, under the lease."""
        work = self._rng.choice(WORKS)
        if work[1] == "build" and any(each.attempt.work == work for each in self._living):
            return
        count = 1 if work[1] == "build" else self._rng.choice([1, 1, 2, 3])
        if not all(self.compare(work)) or not self.agreed:
            return
        guards = [self._guard(work) for _ in range(count)]
        for guard in guards:
            self._refusal(guard, work)
        attempts = [self._oracle.begins(work, self.world) for _ in guards]
        for guard, attempt in zip(guards, attempts, strict=True):
            (fate,) = self._rng.choices(list(FATES), list(FATES.values()))
            self._living.append(self._enter(guard, fate, attempt))
        self.log.append(f"{count} begin {work[1]} {work[2]} of {work[0][:4]}")

    def _enter(self, guard: Guard, fate: str, attempt: Attempt) -> _Worker:
        _, phase, digest = attempt.work
        if fate in (WELL, RAISES):
            stack = contextlib.ExitStack()
            if phase == "build" and fate == WELL:
                stack.enter_context(guard.remembered())
            stack.enter_context(guard.marked(phase, digest))
            error = RuntimeError("fails")
            leave = stack.close if fate == WELL else lambda: stack.__exit__(RuntimeError, error, None)
            return _Worker(leave, fate, attempt, None)
        made = guard._mark(phase, digest)
        assert made is not None, guard.problem
        path, descriptor, _ = made
        self._touch(path)
        return _Worker(lambda: os.close(descriptor), fate, attempt, path)

    def _touch(self, path: Path) -> None:
        os.utime(path, (self.world.now, self.world.now))

    def _end(self) -> None:
        if self._living:
            self._end_of(self._rng.choice(self._living))

    def _end_of(self, worker: _Worker, fate: str = "") -> None:
        fate = fate or worker.fate
        self._living.remove(worker)
        self.log.append(f"{worker.attempt.work[1]} {worker.attempt.work[2]} {fate}")
        if worker.path is None:
            with contextlib.suppress(RuntimeError):
                worker.end()
            if fate == WELL:
                self._oracle.succeeds(worker.attempt, self.world)
            return
        written = worker.attempt.began.now
        if report := _report(fate, self._rng):
            with worker.path.open("a") as file:
                file.write(report)
            self._touch(worker.path)
            written = self.world.now
        elif fate == SILENT and self.world.kills is not None and self._rng.random() < 0.4:
            self.world.kills += 1  # the kernel did it
            self.log.append("for lack of memory")
        worker.end()
        self._oracle.dies(worker.attempt, fate, written)

    def _wait(self) -> None:
        seconds = self._rng.choice(
            [30.0, 2 * MINUTE, 16 * MINUTE, 70 * MINUTE, 0.9 * DAY, 1.1 * DAY, 2.2 * DAY, 40 * DAY]
        )
        self.world.now += seconds
        self.log.append(f"{seconds:g} s")

    def _stranger(self) -> None:
        if self.world.kills is not None:
            self.world.kills += self._rng.choice([1, 1, 3])
            self.log.append("the kernel kills others")

    def _all_die(self) -> None:
        for worker in [each for each in self._living if each.path is not None]:
            self._end_silently(worker)

    def _end_silently(self, worker: _Worker) -> None:
        self._living.remove(worker)
        worker.end()
        self._oracle.dies(worker.attempt, SILENT, worker.attempt.began.now)

    def _reboot(self) -> None:
        self._all_die()
        self.world.boot = f"boot {self._rng.random()}"
        self.world.kills = None if self.world.kills is None else self._rng.choice([0, 0, 5])
        self.log.append("reboot")

    def _new_container(self) -> None:
        self._all_die()
        if self.world.kills is not None:
            self.world.group, self.world.kills = f"group {self._rng.random()}", self._rng.choice([0, 0, 5])
        self.log.append("another container")

    def _clock_jumps(self) -> None:
        seconds = self._rng.choice([-1, 1]) * self._rng.choice([2 * MINUTE, 3600.0, 3 * DAY, 3650 * DAY])
        self.world.now += seconds
        self.log.append(f"the clock jumps by {seconds:g} s")

    def _disk(self) -> None:
        self.world.free = self._rng.choice([0, 300_000, 1 << 20, 3 << 20, 1 << 34, 1 << 34])
        self.log.append(f"{self.world.free} bytes free")

    def _torn_marker(self) -> None:
        folder = self._root / "guards"
        folder.mkdir(exist_ok=True)
        text = self._rng.choice([b"", b"{", b'{"key": "x"}\n', b"\xff\n"])
        (folder / f"{self._rng.choice(list(KEYS))}.torn{self._rng.random()}").write_bytes(text)

    def _lift(self) -> None:
        key = self._rng.choice(list(KEYS))
        lift_quarantine(self._root, key)
        self._oracle.lifts(key)
        self.log.append(f"{key[:4]} is lifted")


@contextlib.contextmanager
def _seen(world: World) -> Iterator[None]:
    """The guard sees this world."""
    with pytest.MonkeyPatch.context() as patched:
        for module in (guard_module, markers_module):
            patched.setattr(module, "oom_kills", lambda: world.kills)
            patched.setattr(module, "memory_group", lambda: world.group)
            patched.setattr(module, "boot_id", lambda: world.boot)
        patched.setattr(guard_module, "crash_report_to", contextlib.nullcontext)
        patched.setattr(time, "time", lambda: world.now)
        patched.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=world.free))
        yield


def _evidence(tally: Tally, root: Path, rng: random.Random, what: str) -> None:
    """The end of a model's process, and whether the call that ran alone there is blamed for it."""
    holder, folder = Holder(rng.randint(2, 9), rng.randint(1, 9)), Folder(root)
    code = rng.choice([None, 0, 1, 9, 70, 71, *(-number for number in range(1, 32))])
    word = rng.choice([None, None, "silent", "stopped"])
    kills = rng.choice([(None, None), (3, 3), (3, 4), (None, 4), (3, None)])
    if code is not None:
        folder.write_ended(holder, code)
    elif rng.random() < 0.5:
        folder.write_ended(Holder(holder.pid, holder.start + 1), -11)  # another process that had its number
    if word is not None:
        folder.write_killed(holder, word)
    elif rng.random() < 0.3:
        folder.write_killed(Holder(holder.pid, holder.start - 1), "silent")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(call_blame, "oom_kills", lambda: kills[1])
        patched.setattr(call_blame, "EVIDENCE_SECONDS", 0.0)
        found = call_blame.what_ended_it(folder, holder, kills[0])
    expected = oracle_is_evidence(code, word, kills)
    outcome = "refusal" if expected else "served"
    if (found is not None) != expected:
        outcome = "forgotten" if expected else "blamed"
    tally.trial(outcome, f"{what}: code {code}, word {word}, kills {kills}: {found}")


def run(tally: Tally, folder: Path, seed: int, trials: int) -> None:
    """So many histories, or ends."""
    for number in range(trials):
        rng, root = random.Random(f"{seed}/{number}"), Path(tempfile.mkdtemp(dir=folder))
        what = f"blame seed {seed}, trial {number}"
        if number % 4 == 3:
            _evidence(tally, root, rng, what)
        else:
            history = History(tally, root, rng, what)
            with _seen(history.world):
                try:
                    history.run()
                    tally.trial("ended")
                except Exception as error:
                    tally.trial("escaped", f"{what}: {type(error).__name__}: {error}: {'; '.join(history.log)}")
                finally:
                    history.close()
        shutil.rmtree(root, ignore_errors=True)

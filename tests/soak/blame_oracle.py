"""What docs/decisions/0029-blame-and-healing.md says of dead processes, told from what happened to them.

Written from that page, and not from the code that it judges: it keeps deaths and verdicts in lists of its own, and
reads no marker and no record.
"""

from __future__ import annotations

import dataclasses

CRASH, TIMEOUT, ASKED, SILENT, ELSEWHERE = "crash", "timeout", "asked to end", "silent", "crash in another thread"
CERTAIN = (CRASH, TIMEOUT)
MINUTE, DAY = 60.0, 86400.0
FULL = 1 << 20

Work = tuple[str, str, str]
"""Key, phase and manifest's digest of what a process tried."""


@dataclasses.dataclass
class World:
    """What a process of this host can see.

    Attributes
    ----------
    now:
        What the clock shows, right or wrong, in seconds since the epoch.
    boot, group, kills:
        This boot, this process's control group, and the kernel's kills in it for lack of memory; None where uncounted.
    free:
        Free bytes of every disk.
    """

    now: float
    boot: str = "boot 0"
    group: str = "group 0"
    kills: int | None = 0
    free: int = 1 << 34


@dataclasses.dataclass(eq=False)
class Attempt:
    """A process that tries something, and the world in which it began.

    Attributes
    ----------
    round:
        One above those of the unjudged deaths of the same work that lay there when it began.
    how:
        How it ended; empty while it lives.
    written:
        When it wrote last into its marker.
    saw_over:
        Whether it saw a verdict that time had lifted.
    """

    work: Work
    began: World
    round: int
    saw_over: bool = False
    how: str = ""
    written: float = 0.0


@dataclasses.dataclass
class Held:
    """An uncertain verdict, or a build that failed, with how often in a row, when, and for how long."""

    times: int
    since: float
    seconds: float
    free: int = 0


class Oracle:
    """Says what may be tried."""

    def __init__(self) -> None:
        self.dead: list[Attempt] = []
        self.certain: set[Work] = set()
        self.uncertain: dict[Work, Held] = {}
        self.failed: dict[str, Held] = {}

    def begins(self, work: Work, world: World) -> Attempt:
        """A process begins, which `refuses` has let through."""
        rounds = [death.round + 1 for death in self.dead if death.work == work]
        over = [self._over(held, world) for other, held in self.uncertain.items() if self._is_seen(other, work)]
        return Attempt(work, dataclasses.replace(world), max(rounds, default=0), any(over))

    def dies(self, attempt: Attempt, how: str, written: float) -> None:
        """It has ended."""
        attempt.how, attempt.written = how, written
        self.dead.append(attempt)

    def succeeds(self, attempt: Attempt, world: World) -> None:
        """It has ended well: uncertain deaths of the same work are forgiven, and uncertain verdicts that are over."""
        self.dead = [
            death
            for death in self.dead
            if death.work != attempt.work
            or death.how not in (SILENT, ELSEWHERE)
            or self._was_killed_for_memory(death, world)
        ]
        held = self.uncertain.get(attempt.work)
        if held is not None and attempt.saw_over and self._over(held, world):
            del self.uncertain[attempt.work]
        if attempt.work[1] == "build":
            self.failed.pop(attempt.work[0], None)

    def lifts(self, key: str) -> None:
        """Somebody has lifted all that is held against a key."""
        self.dead = [death for death in self.dead if death.work[0] != key]
        self.certain = {work for work in self.certain if work[0] != key}
        self.uncertain = {work: held for work, held in self.uncertain.items() if work[0] != key}
        self.failed.pop(key, None)

    def refuses(self, work: Work, world: World) -> str:
        """``quarantined``, ``failed`` or, when it may be tried, nothing."""
        self._judge(work[0], world)
        held = self.uncertain.get(work)
        if work in self.certain or (held is not None and not self._over(held, world)):
            return "quarantined"
        failed = self.failed.get(work[0])
        if work[1] == "build" and failed is not None and not self._may_be_built(failed, world):
            return "failed"
        return ""

    @staticmethod
    def _is_seen(other: Work, work: Work) -> bool:
        """Whether a start of one work reads the verdict on another."""
        return other[0] == work[0] and (work[1] == "build" or other[1] != "build")

    def _judge(self, key: str, world: World) -> None:
        deaths = [death for death in self.dead if death.work[0] == key]
        told = [(death, self._verdict(death, deaths, world)) for death in deaths]
        for death, verdict in told:
            if verdict == "wait":
                continue
            self.dead.remove(death)
            if verdict == "full disk":
                self._fails(death, world)
            elif verdict == "certain":
                self.certain.add(death.work)
        for work in {death.work for death, verdict in told if verdict == "uncertain"}:
            before = self.uncertain.get(work)
            if before is not None and not self._over(before, world):
                continue  # of a process that died together with one that was judged before
            times = before.times + 1 if before is not None else 1
            self.uncertain[work] = Held(times, world.now, min(30 * DAY, DAY * 2 ** (times - 1)))

    def _verdict(self, death: Attempt, deaths: list[Attempt], world: World) -> str:
        recent = -5 * MINUTE <= world.now - death.written <= DAY
        if death.how == ASKED:
            return "nobody's"
        if death.work[1] == "build" and recent and min(world.free, death.began.free) < FULL:
            return "full disk"
        if death.how in CERTAIN:
            return "certain"
        if self._was_killed_for_memory(death, world):
            return "uncertain"
        if not recent:
            return "nobody's"
        rounds = {
            other.round
            for other in deaths
            if other.work == death.work
            and other.how in (SILENT, ELSEWHERE)
            and -5 * MINUTE <= world.now - other.written <= DAY
            and not self._was_killed_for_memory(other, world)
        }
        forgiven = 2 if death.work[1] == "build" else 1
        return "uncertain" if len(rounds) > forgiven else "wait"

    def _was_killed_for_memory(self, death: Attempt, world: World) -> bool:
        began = death.began
        if death.how != SILENT or began.kills is None or world.kills is None:
            return False
        if (began.boot, began.group) != (world.boot, world.group):
            return False
        silent = sum(other.how == SILENT and other.began.group == began.group for other in self.dead)
        return -5 * MINUTE <= world.now - death.written <= 15 * MINUTE and world.kills - began.kills >= silent

    def _fails(self, death: Attempt, world: World) -> None:
        before = self.failed.get(death.work[0])
        times = before.times + 1 if before is not None else 1
        held = min(60 * MINUTE, MINUTE * 2.0 ** (times - 1))
        self.failed[death.work[0]] = Held(times, world.now, held, min(world.free, death.began.free))

    @staticmethod
    def _over(held: Held, world: World) -> bool:
        return not -5 * MINUTE <= world.now - held.since < held.seconds

    @staticmethod
    def _may_be_built(failed: Held, world: World) -> bool:
        return world.free >= 2 * failed.free + FULL or abs(world.now - failed.since) >= failed.seconds


FAULTS = (4, 5, 6, 7, 8, 11, 31)
"""SIGILL, SIGTRAP, SIGABRT, SIGBUS, SIGFPE, SIGSEGV and SIGSYS."""
KILL = 9


def is_evidence(code: int | None, word: str | None, kills: tuple[int | None, int | None]) -> bool:
    """Whether the end of the model's process speaks against the call that ran alone there, by decision 31.

    Parameters
    ----------
    code:
        How it ended, as `subprocess.Popen.returncode` has it; None when nobody knows.
    word:
        Why a worker has ended it: ``silent``, ``stopped``, or None for no worker.
    kills:
        The kernel's kills for lack of memory when the call was sent, and now.
    """
    if word is not None:
        return word == "silent"
    if code is None:
        return False
    if code >= 0:
        return code not in (0, 71)
    before, now = kills
    return -code in FAULTS or (-code == KILL and before is not None and now is not None and now > before)

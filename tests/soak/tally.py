"""What the trials of a soak came to."""

from __future__ import annotations

import collections

MUST_BE_ZERO = {
    "wrong": "wrong answers",
    "partial": "partial reads",
    "lost": "lost entries",
    "duplicate": "duplicate builds",
    "crash": "crashes",
    "escaped": "escaped errors",
    "stuck": "stuck stores",
    "blamed": "blamed without cause",
    "forgotten": "causes forgotten",
    "neighbour": "requests failed by a neighbour",
    "unbounded": "refusals above a kilobyte",
}
"""What must not happen, and how the summary line calls it."""


class Tally:
    """Counts of outcomes, and what exactly was wrong where a count must be zero.

    Other outcomes: ``rebuild`` (the artifact was built again), ``refusal`` (what was damaged or failed was not used and
    the answer came from elsewhere, or the caller got the documented error), ``served`` (used as it should be).
    """

    def __init__(self) -> None:
        self.trials = 0
        self.counts: collections.Counter[str] = collections.Counter()
        self.failures: list[str] = []

    def trial(self, outcome: str, what: str = "", count: int = 1) -> None:
        """Count a trial, or `count` of them; `what` tells how to see a failure again."""
        self.trials += count
        self.note(outcome, what, count)

    def note(self, outcome: str, what: str = "", count: int = 1) -> None:
        """Count an outcome that is not a trial of its own."""
        self.counts[outcome] += count
        if outcome in MUST_BE_ZERO and count:
            self.failures.append(f"{MUST_BE_ZERO[outcome]}: {what}")

    def add(self, other: Tally) -> None:
        """Count everything of another tally too."""
        self.trials += other.trials
        self.counts += other.counts
        self.failures += other.failures

    @property
    def clean(self) -> bool:
        """Whether nothing happened that must not."""
        return not self.failures and not any(self.counts[name] for name in MUST_BE_ZERO)

    def summary(self, name: str) -> str:
        """One line."""
        zeros = ", ".join(f"{self.counts[key]} {text}" for key, text in MUST_BE_ZERO.items())
        rest = f"{self.counts['rebuild']} rebuilds, {self.counts['refusal']} refusals, {self.counts['served']} served"
        return f"{name}: {self.trials} trials, {zeros}, {rest}"

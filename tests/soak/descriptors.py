"""Artifacts that close descriptors which are not theirs, whose numbers are then other files: no start fails of it.

A trial is a start, a hit or a build, whose native code closes some or all of the descriptors that were opened since the
start began (the marker's, those of locks and folders), while it is built, loaded and called, and opens files that take
their numbers. It does so while no other thread of the package is at work: of what a thread has open for a moment nobody
can tell afterwards whose the number is. Afterwards those files must be open and hold what was written, nothing is held
against the artifact, and the next start hits.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from tests.soak import forks
from tests.soak.subject import Subject, judge
from tests.soak.tally import Tally
from tests.support import file_backend
from ts_handlers.backends.base import Built, Description, Target, Workspace
from ts_handlers.execution.base import Loaded
from ts_handlers.guard.quarantine import read_quarantines
from ts_handlers.store.upkeep.audit import audit
from ts_handlers.store.upkeep.space import wait_for_room

TEXT = b"somebody else's"


def _open() -> set[int]:
    """Descriptors that are open, without that of the listing itself."""
    numbers = {int(name) for name in os.listdir("/proc/self/fd")}
    return {number for number in numbers if os.path.exists(f"/proc/self/fd/{number}")}


class _Closing(file_backend.FileBackend):
    """The backend of the tests, whose code closes descriptors."""

    def __init__(self, rng: random.Random, folder: Path) -> None:
        super().__init__()
        self._rng, self._folder = rng, folder
        self._before = _open()
        self._moments = rng.choice([{"load"}, {"load", "call"}, {"build"}, {"build", "load", "loaded", "call"}])
        self._all, self._reuses = rng.random() < 0.5, rng.random() < 0.6
        self.foreign: dict[int, Path] = {}

    def build(self, target: Target, workspace: Workspace) -> Built:
        self._close("build")
        return super().build(target, workspace)

    def load(self, target: Target, directory: Path, description: Description) -> Loaded:
        self._close("load")
        loaded = super().load(target, directory, description)
        self._close("loaded")
        run = loaded.run

        def closing_run(tensors: list[torch.Tensor]) -> Any:
            self._close("call")
            return run(tensors)

        return Loaded(closing_run, loaded.signature)

    def _close(self, moment: str) -> None:
        if moment not in self._moments:
            return
        wait_for_room()
        numbers = sorted(_open() - self._before - set(self.foreign))
        for number in numbers if self._all else self._rng.sample(numbers, len(numbers) // 2):
            with contextlib.suppress(OSError):  # that of the listing
                os.close(number)
                if self._reuses:
                    self._take(number)

    def _take(self, number: int) -> None:
        path = self._folder / f"foreign-{len(self.foreign)}"
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL)
        if descriptor != number:
            os.dup2(descriptor, number)
            os.close(descriptor)
        os.write(number, TEXT)
        self.foreign[number] = path

    def harmed(self) -> list[str]:
        """The foreign files that somebody has closed or written to."""
        found = []
        for number, path in self.foreign.items():
            try:
                same = os.path.samestat(os.fstat(number), path.stat())
            except OSError:
                same = False
            if not same or path.read_bytes() != TEXT:
                found.append(f"{path.name} at {number}: {'written to' if same else 'closed'}")
        return found


@contextlib.contextmanager
def _closing(backend: _Closing) -> Iterator[None]:
    before, file_backend.BACKEND = file_backend.BACKEND, backend
    try:
        yield
    finally:
        file_backend.BACKEND = before


def _start(subject: Subject, root: Path, folder: Path, rng: random.Random) -> dict[str, Any]:
    backend = _Closing(rng, folder)
    with _closing(backend):
        facts = subject.start(root)
    return {**facts, "foreign": len(backend.foreign), "harmed": backend.harmed()}


def run(tally: Tally, folder: Path, seed: int, trials: int) -> None:
    """So many starts."""
    subject, filled = Subject(folder / "subject", real=False), folder / "filled"
    subject.prepare(filled)
    for number in range(trials):
        rng = random.Random(f"{seed}/{number}")
        place, hits = folder / "trial", rng.random() < 0.6
        place.mkdir()
        root = place / "store"
        shutil.copytree(filled, root) if hits else root.mkdir(mode=0o700)
        what = f"descriptors seed {seed}, trial {number}, {'hit' if hits else 'build'}"
        result = forks.call(lambda: _start(subject, root, place, rng))  # noqa: B023
        judge(tally, what, result, may_serve=True)
        facts = result[1]
        if facts is not None:
            _look(tally, what, root, facts, "hit" if hits else "built")
        code, again, text = forks.call(lambda: subject.start(root))  # noqa: B023
        if code or not again["right"] or again["result"] != "hit":
            tally.note("lost", f"{what}, then a start: {again or text}; the first: {facts}")
        shutil.rmtree(place)


def _look(tally: Tally, what: str, root: Path, facts: dict[str, Any], expected: str) -> None:
    for text in facts["harmed"]:
        tally.note("neighbour", f"{what}: {text}")
    if facts["result"] != expected:
        tally.note("blamed", f"{what}: expected {expected}: {facts}")
    for record in read_quarantines(root):
        tally.note("blamed", f"{what}: {record}")
    left = [str(path) for path in (root / "guards").glob("*")]
    damaged = [str(finding) for finding in audit(root) if finding.problem is not None]
    if left or damaged:
        tally.note("stuck", f"{what}: left {left}, damaged {damaged}")

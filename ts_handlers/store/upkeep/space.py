"""Keeping a store within its quotas: collect garbage, plan evictions, carry them out, and say what was done."""

from __future__ import annotations

import dataclasses
import logging
import threading
from collections.abc import Callable
from pathlib import Path

from ts_handlers.settings.sections import SpaceSettings
from ts_handlers.store.upkeep.eviction import Quotas, evict, find_candidates, plan
from ts_handlers.store.upkeep.garbage import find_garbage

logger = logging.getLogger(__name__)

_THREAD = "ts_handlers-space"
ROUNDS = 3  # an entry that turns out to be in use is replaced by the next one in a further round


@dataclasses.dataclass(frozen=True)
class Step:
    """One removal: what, why, and `refusal`: None when it is gone (or would go), otherwise why it stays."""

    kind: str  # "garbage" or "evict"
    path: Path
    model: str | None
    key: str | None
    bytes: int
    inodes: int
    reason: str
    refusal: str | None = None


@dataclasses.dataclass(frozen=True)
class Report:
    """What `make_room` did, or would do, and which quotas stay exceeded."""

    steps: tuple[Step, ...]
    unmet: tuple[str, ...]

    @property
    def done(self) -> tuple[Step, ...]:
        """The steps that were carried out."""
        return tuple(step for step in self.steps if step.refusal is None)

    @property
    def evicted(self) -> int:
        """How many entries have gone."""
        return sum(step.kind == "evict" for step in self.done)

    @property
    def freed_bytes(self) -> int:
        """Bytes that are free now."""
        return sum(step.bytes for step in self.done)


def make_room(root: Path, store: Quotas, per_model: Quotas, *, dry_run: bool = False) -> Report:
    """Collect garbage and evict until the store and each of its models keep their quotas.

    Any number of processes may do this at once, and each may die at any moment.
    """
    steps = []
    for item in find_garbage(root):
        refusal = None if dry_run else item.remove()
        steps.append(Step("garbage", item.path, None, None, item.bytes, item.inodes, item.reason, refusal))
    refused: set[Path] = set()
    unmet: tuple[str, ...] = ()
    for _ in range(ROUNDS):
        planned = plan(find_candidates(root, refused), store, per_model)
        unmet = planned.unmet
        stayed = set()
        for eviction in planned.evictions:
            what = eviction.candidate
            refusal = None if dry_run else evict(root, eviction)
            if refusal is not None:
                stayed.add(what.directory)
            steps.append(
                Step("evict", what.directory, what.model, what.key, what.bytes, what.inodes, eviction.reason, refusal)
            )
        if not stayed:
            break
        refused |= stayed
    return Report(tuple(steps), unmet)


def make_room_in_background(
    root: Path, settings: SpaceSettings, done: Callable[[Report], None] = lambda report: None
) -> threading.Thread:
    """`make_room` on a thread that neither delays nor fails anybody; it ends with the process."""

    def run() -> None:
        try:
            report = make_room(root, Quotas.of(settings.store), Quotas.of(settings.per_model))
        except Exception:
            logger.warning("the store %s could not be tidied", root, exc_info=True)
            return
        for step in report.done:
            logger.info("removed %s (%d bytes): %s", step.path, step.bytes, step.reason)
        for text in report.unmet:
            logger.warning("%s: %s", root, text)
        done(report)

    thread = threading.Thread(target=run, daemon=True, name=_THREAD)
    thread.start()
    return thread


def wait_for_room() -> None:
    """Wait until every `make_room_in_background` of this process is over: for processes that end after a build."""
    for thread in threading.enumerate():
        if thread.name == _THREAD:
            thread.join()

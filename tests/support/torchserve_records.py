"""What a server's start left behind: start records, published entries, and the first start that tests share.

What a start did is counted three ways: by the counters that `describe` shows, by the start records in the server's log,
one per worker, and by the entries published in the store.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ts_handlers.testing import TorchServe

ServerFactory = Callable[..., TorchServe]


def published(store: Path) -> list[Path]:
    """Manifests of the entries in a store."""
    return sorted((store / "entries").rglob("manifest.json"))


def starts(server: TorchServe, model: str) -> list[dict[str, Any]]:
    """The start record of each worker of a model, in the order of the log."""
    records = [json.loads(line.partition("ts_handlers start ")[2]) for line in _start_lines(server.log())]
    return [record for record in records if record["model"] == model]


def _start_lines(log: str) -> list[str]:
    return [line for line in log.splitlines() if "ts_handlers start {" in line]


@dataclasses.dataclass(frozen=True)
class FirstStart:
    """What was seen of the tiny model's first start on an empty store."""

    store: Path
    description: dict[str, Any]
    starts: list[dict[str, Any]]
    entries: int
    answer: Any


def copy_store(first_start: FirstStart, target: Path) -> Path:
    """Copy the store that the first start filled."""
    shutil.copytree(first_start.store, target)
    return target

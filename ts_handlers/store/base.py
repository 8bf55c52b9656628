"""The contract of a store, and what a lookup finds."""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path
from typing import Any, Protocol

from ts_handlers.store.address import Address
from ts_handlers.store.entry import Manifest


@dataclasses.dataclass(frozen=True)
class Hit:
    """A complete entry whose files have the digests of its manifest."""

    directory: Path
    manifest: Manifest


@dataclasses.dataclass(frozen=True)
class Miss:
    """No entry. `parts` names what differs from the nearest entry of the same model; empty when there is none."""

    parts: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Corrupt:
    """An entry that must not be used. It has been moved aside; the caller rebuilds."""

    reason: str


class Store(Protocol):
    """Where artifacts are kept.

    `lookup` never returns a partial entry, and never one whose bytes differ from its manifest. `publish` is atomic: a
    reader sees all of an entry or nothing. Neither waits for another process's build; only `lease` does. `notes` tells
    `describe` what a start should know about the store.
    """

    root: Path
    notes: list[str]

    def lookup(self, address: Address) -> Hit | Miss | Corrupt:
        """Find and verify an entry."""

    def build_estimate(self, address: Address) -> float | None:
        """Seconds that the latest build of this model and backend took, or None."""

    def staging(self, address: Address) -> contextlib.AbstractContextManager[Path]:
        """A private directory to build an entry in; removed at the end of the block unless published."""

    def publish(self, address: Address, staging: Path, manifest: Manifest) -> Path:
        """Make a staged entry visible and return its directory. Raises `StoreError`."""

    def discard(self, address: Address, reason: str) -> bool:
        """Move the entry that was found aside, so that it is not found again; False when it is gone already."""

    def lease(self, address: Address, estimate: float | None) -> contextlib.AbstractContextManager[Any]:
        """The right to build this key, held by one process of the host at a time; blocks."""

    def read_canary(self, address: Address, weights_digest: str) -> dict[str, Any] | None:
        """The recorded canary of a key for these weights, or None."""

    def write_canary(self, address: Address, weights_digest: str, record: dict[str, Any]) -> bool:
        """Record a canary; False when the store cannot be written."""

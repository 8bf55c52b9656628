"""The contract of a store, and what a lookup finds."""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ts_handlers.key.names import Names
from ts_handlers.store.address import Address
from ts_handlers.store.entry import Manifest

if TYPE_CHECKING:
    from ts_handlers.model.declaration import Declaration
    from ts_handlers.model.observed_calls import ObservedCalls
    from ts_handlers.store.observed import CallsRecord


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


class PendingWrites(Protocol):
    """What a store still has to send elsewhere after a method has returned."""

    def wait(self, seconds: float | None = None) -> bool:
        """Wait until everything is sent or given up; False when that took longer than `seconds`."""


class NoPendingWrites:
    """The `PendingWrites` of a store whose writes are complete when its methods return."""

    def wait(self, seconds: float | None = None) -> bool:
        """True, at once."""
        return True


class Store(Protocol):
    """Where artifacts are kept, as one process of a host sees it.

    - `lookup` never returns a partial entry, and never one whose bytes differ from its manifest.
    - `publish` is atomic: a reader sees all of an entry or nothing.
    - An entry that this object has found or published is not evicted until `close`, or until the object is dropped.
    - Only `lease` waits for another process's build.
    - Only `publish` raises `StoreError`. A store that cannot be written still finds what it holds, and a remote store
      that does not answer is as good as an empty one.
    """

    @property
    def name(self) -> str:
        """What messages call the store: where it lies."""

    @property
    def notes(self) -> list[str]:
        """What a start should know about the store, for `describe`; grows while the store is used."""

    @property
    def state_directory(self) -> Path:
        """The folder on this host that the store's processes share.

        The crash guard keeps its files in it, processes agree there on one background build, and its disk is the one
        that fills up. `ts_handlers.store.local.layout` names what lies in it.
        """

    @property
    def shared_directory(self) -> Path:
        """Where builds of this host keep what makes later builds faster; not made before somebody needs it."""

    @property
    def write_back(self) -> PendingWrites:
        """What is sent to other hosts after `publish` and `write_canary` have returned."""

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

    def read_outside(self, base: str) -> Names:
        """What making the model of a key reads from outside its archive, as far as this host knows.

        Parameters
        ----------
        base:
            The digest of the key without its part for that.
        """

    def write_outside(self, base: str, names: Names) -> bool:
        """Keep names, beside those that are known; False when the store cannot be written."""

    def read_calls(self, identity: str) -> CallsRecord | None:
        """What is known of the calls of a model whose inputs nobody has declared, or None; see `store/observed.py`."""

    def add_calls(self, identity: str, calls: ObservedCalls) -> bool:
        """Add calls to those that are known; False when the store cannot be written."""

    def read_declaration(self, identity: str) -> Declaration | None:
        """What calls have told of a model's inputs, once that was built for, or None."""

    def write_declaration(self, identity: str, declaration: Declaration) -> bool:
        """Let later starts take this for declared; False when the store cannot be written."""

    def close(self) -> None:
        """Send what is pending, for as long as the end of a process may take, and give up the locks on entries.

        May be called more than once. The files of entries may go afterwards.
        """

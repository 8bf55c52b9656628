"""Scratch memory of execution contexts: how much there will be, whether it fits, and sharing one buffer safely.

An inference needs scratch memory only while it runs. With ``scratch: private`` each slot has a buffer of its own and
inferences overlap on the GPU; with ``shared`` there is one buffer, and inferences follow one another. The prediction is
made before anything is allocated, from what the engines say about each profile.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections.abc import Iterator, Sequence
from typing import Any, Literal

from ts_handlers.errors import ContextMemoryError
from ts_handlers.execution.engine import Engine, Stream

ALIGNMENT = 512
"""torch's allocator hands out multiples of this many bytes; TensorRT asks for 256."""

Scratch = Literal["private", "shared"]


@dataclasses.dataclass(frozen=True)
class ProfileMemory:
    """What one context of one profile needs, in bytes."""

    name: str
    scratch: int
    buffers: int


@dataclasses.dataclass(frozen=True)
class SlotMemory:
    """The memory of k slots, in bytes, before it is allocated.

    A slot holds one context for each profile, of which one runs at a time; so one scratch buffer, as large as the
    largest profile asks for, serves all contexts of a slot. Weights are not included: the engines hold them once.
    """

    profiles: tuple[ProfileMemory, ...]
    count: int
    scratch: Scratch

    @property
    def scratch_each(self) -> int:
        """One scratch buffer."""
        return _rounded(max(profile.scratch for profile in self.profiles))

    @property
    def scratch_total(self) -> int:
        """All scratch buffers."""
        return self.scratch_each * (self.count if self.scratch == "private" else 1)

    @property
    def buffers_each(self) -> int:
        """Outputs and bindings of one slot."""
        return sum(_rounded(profile.buffers) for profile in self.profiles)

    @property
    def total(self) -> int:
        """Everything that is allocated for the slots."""
        return self.scratch_total + self.buffers_each * self.count

    def largest_count(self, available: int, scratch: Scratch | None = None) -> int:
        """How many slots fit into `available` bytes; a device without need for memory has no bound, 2**31."""
        setting = scratch or self.scratch
        fixed = self.scratch_each if setting == "shared" else 0
        each = self.buffers_each + (self.scratch_each if setting == "private" else 0)
        if available < fixed:
            return 0
        return (available - fixed) // each if each else 2**31

    def require(self, available: int) -> None:
        """Refuse what does not fit.

        Raises
        ------
        ContextMemoryError
            With the figures of each part and the largest count that fits.
        """
        if self.total <= available:
            return
        private, shared = self.largest_count(available, "private"), self.largest_count(available, "shared")
        raise ContextMemoryError(
            f"contexts.count {self.count} with {self.scratch} scratch needs {self.total} bytes (scratch "
            f"{self.scratch_total}, outputs and bindings {self.count} x {self.buffers_each}), {available} are free; "
            f"at most {private} contexts fit with private scratch, {shared} with shared"
        )

    def describe(self) -> dict[str, Any]:
        """The figures, for `describe`."""
        return {
            "count": self.count,
            "scratch": self.scratch,
            "scratch_bytes": self.scratch_total,
            "buffer_bytes": self.buffers_each * self.count,
            "total_bytes": self.total,
            "profiles": [dataclasses.asdict(profile) for profile in self.profiles],
        }


def predict_memory(engines: Sequence[Engine], count: int, scratch: Scratch) -> SlotMemory:
    """Predict the memory of `count` slots with a context for each profile of each engine."""
    profiles = [
        ProfileMemory(
            engine.name if engine.profiles == 1 else f"{engine.name}#{profile}",
            engine.scratch_bytes(profile),
            engine.buffer_bytes(profile),
        )
        for engine in engines
        for profile in range(engine.profiles)
    ]
    return SlotMemory(tuple(profiles), count, scratch)


def _rounded(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


class SharedScratch:
    """The chain of inferences that use one scratch buffer.

    Enqueueing is done under a lock, which is short; the inferences themselves are chained on the device: each waits for
    the event that the one before it left behind.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._last: Any = None
        self._broken: BaseException | None = None

    @contextlib.contextmanager
    def use(self, stream: Stream) -> Iterator[None]:
        """Work put on `stream` inside the block has the buffer for itself."""
        with self._lock:
            if self._broken is not None:
                raise RuntimeError(
                    "the shared scratch memory cannot be used any more: an event could not be recorded"
                ) from self._broken
            if self._last is not None:
                stream.wait_event(self._last)
            try:
                yield
            finally:  # a block that failed may have put work on the stream
                try:
                    self._last = stream.record_event()
                except BaseException as error:
                    self._broken = error
                    raise

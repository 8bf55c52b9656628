"""The contract of this folder: what is said of a computed answer, what a request gets, and what a shared tier does."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Sequence
from typing import Any, Literal, Protocol

Key = bytes
"""Digest and length of all that shapes an answer, see `ts_handlers.result_cache.keys`; compared whole."""
Count = Callable[[str, int], None]
"""Increases a counter of `ts_handlers.metrics.COUNTERS` by an amount."""


@dataclasses.dataclass(frozen=True, slots=True)
class Computed:
    """An answer that was computed just now.

    Attributes
    ----------
    value:
        What the request gets for which it was computed; the others too, where `stored` is None.
    stored:
        What the others get: who waits for the same answer, and later requests. Nobody changes it; it is bytes where
        there is a shared tier.
    size:
        The bytes of `stored`; None keeps nothing.
    shared:
        Whether the answer is one for equal requests at all. If not, each of them is computed by itself.
    """

    value: Any
    stored: Any = None
    size: int | None = None
    shared: bool = True


@dataclasses.dataclass(frozen=True, slots=True)
class Answered:
    """The answer to one request.

    Attributes
    ----------
    value:
        `Computed.value` where it was computed for this request, otherwise `Computed.stored` if there is one; None where
        `error` is given.
    how:
        Whether it was stored, computed, computed for an equal request at the same time, or computed apart from the
        cache.
    age:
        Seconds since it was computed.
    error:
        What the computation has raised for which this request waited.
    """

    value: Any
    how: Literal["hit", "miss", "coalesced", "bypass"]
    age: float = 0.0
    error: BaseException | None = None


Compute = Callable[[Sequence[int]], Sequence[Computed]]
"""Computes the answers of the requests of these indexes, in their order; what it raises goes to all of them."""


class SharedTier(Protocol):
    """Answers that several hosts share. Nothing raises: a tier that does not answer knows no answers.

    Both methods block for a bounded time.
    """

    def get(self, keys: Collection[Key]) -> dict[Key, tuple[bytes, float]]:
        """What is stored for some of the keys, each with its age in seconds."""

    def put(self, stored: Sequence[tuple[Key, bytes]]) -> None:
        """Store answers for as long as the tier keeps any."""

    def describe(self) -> dict[str, Any]:
        """Where it is, and why it is not asked at the moment; JSON-compatible."""


@dataclasses.dataclass(frozen=True)
class Stats:
    """Gauges of one cache.

    Attributes
    ----------
    entries, stored_bytes, max_bytes:
        How many answers are kept, what they take with their overhead, and what they may take.
    under_way:
        Computations that have not ended.
    """

    entries: int
    stored_bytes: int
    max_bytes: int
    under_way: int

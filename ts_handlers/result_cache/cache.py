"""`ResultCache`: stored answers, and equal requests under way that are computed once.

A request whose key is stored is a *hit*. The first one of a key that is not stored computes the answer; equal ones that
come meanwhile wait for it. What it raises goes to those who wait, and is never stored. A wait is bounded: who has
waited too long computes the answer by itself, and so does everybody where the first one turns out not to be shareable.
A waiter holds nothing, so one that goes away ends nothing.

A thread computes all of its own answers before it waits for another's, so that no two threads wait for each other.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

from ts_handlers.result_cache.base import Answered, Compute, Computed, Count, Key, SharedTier, Stats
from ts_handlers.result_cache.lru import ByteLRU


class ResultCache:
    """Answers of one model.

    Parameters
    ----------
    max_bytes, ttl:
        As of `ts_handlers.result_cache.lru.ByteLRU`.
    wait_seconds:
        How long a request waits for an equal one.
    count:
        Gets the counters ``result_cache_*``.
    shared:
        A tier that other hosts use too, or None.
    clock:
        Seconds that nobody sets back.

    Examples
    --------
    >>> cache = ResultCache(1 << 20, ttl=60.0, wait_seconds=1.0, count=lambda name, amount: None)
    >>> def compute(indexes):
    ...     return [Computed("answer", "answer", 6) for _ in indexes]
    >>> [each.how for each in cache.answer([b"key", b"key", None], compute)]
    ['miss', 'coalesced', 'bypass']
    >>> [each.how for each in cache.answer([b"key"], compute)]
    ['hit']
    """

    def __init__(
        self,
        max_bytes: int,
        ttl: float,
        wait_seconds: float,
        count: Count,
        shared: SharedTier | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._stored = ByteLRU(max_bytes, ttl, count, clock)
        self._wait_seconds = wait_seconds
        self._count = count
        self._shared = shared
        self._lock = threading.Lock()
        self._under_way: dict[Key, _Flight] = {}
        self._epoch = 0

    def answer(
        self, keys: Sequence[Key | None], compute: Compute, refresh: Collection[int] = (), epoch: int = 0
    ) -> list[Answered]:
        """Answer a batch: hits from the store, equal requests once, the rest by `compute`.

        Parameters
        ----------
        keys:
            One for each request; None for one that has nothing to do with the cache.
        compute:
            Called at most once for all that is neither stored nor under way, and again for what was waited for in vain.
        refresh:
            Indexes of requests that want a new answer in the place of a stored one.
        epoch:
            What serves now. A greater number than before empties the cache; keys of different epochs must differ.

        Raises
        ------
        BaseException
            What `compute` has raised.
        """
        self._begin_epoch(epoch)
        answers: dict[int, Answered] = {}
        leading, waiting = self._look_up(keys, range(len(keys)), refresh, answers)
        alone = [index for index, key in enumerate(keys) if key is None]
        self._compute(leading, alone, compute, answers)
        if waiting:
            self._wait(keys, waiting, compute, answers)
        self._count_all(answers.values())
        return [answers[index] for index in range(len(keys))]

    def clear(self) -> None:
        """Forget all answers; those under way go to whoever waits for them and are not stored."""
        with self._lock:
            self._clear()

    def stats(self) -> Stats:
        """The gauges of this moment."""
        with self._lock:
            stored = self._stored
            return Stats(len(stored), stored.bytes, stored.max_bytes, len(self._under_way))

    def describe(self) -> dict[str, Any]:
        """The gauges, and the shared tier; JSON-compatible."""
        stats = self.stats()
        facts = {name: getattr(stats, name) for name in ("entries", "stored_bytes", "max_bytes", "under_way")}
        return {**facts, "shared": None if self._shared is None else self._shared.describe()}

    def _begin_epoch(self, epoch: int) -> None:
        if epoch > self._epoch:
            with self._lock:
                if epoch > self._epoch:
                    self._epoch = epoch
                    self._clear()

    def _clear(self) -> None:
        self._stored.clear()
        for flight in self._under_way.values():
            flight.storable = False
        self._under_way.clear()

    def _look_up(
        self, keys: Sequence[Key | None], indexes: Iterable[int], refresh: Collection[int], answers: dict[int, Answered]
    ) -> tuple[dict[int, _Flight], dict[int, _Flight]]:
        """Answer what is stored; returns what this thread computes, and what somebody computes already."""
        leading: dict[int, _Flight] = {}
        waiting: dict[int, _Flight] = {}
        with self._lock:
            for index in indexes:
                key = keys[index]
                if key is None:
                    continue
                if index not in refresh:
                    entry = self._stored.get(key)
                    if entry is not None:
                        age = self._stored.clock() - entry.computed
                        answers[index] = Answered(entry.value, "hit", age)
                        continue
                    flight = self._under_way.get(key)
                    if flight is not None:
                        waiting[index] = flight
                        continue
                leading[index] = self._under_way[key] = _Flight(key)
        if self._shared is not None and leading:
            self._ask_shared(leading, refresh, answers)
        return leading, waiting

    def _ask_shared(self, leading: dict[int, _Flight], refresh: Collection[int], answers: dict[int, Answered]) -> None:
        assert self._shared is not None
        asked = {flight.key: index for index, flight in leading.items() if index not in refresh}
        try:
            found = self._shared.get(list(asked)) if asked else {}
        except BaseException as error:
            self._fail(leading.values(), error)
            raise
        for key, (stored, age) in found.items():
            index = asked[key]
            self._end(leading.pop(index), Computed(stored, stored, len(stored)), age, from_store=True)
            answers[index] = Answered(stored, "hit", age)

    def _compute(
        self, leading: dict[int, _Flight], alone: Sequence[int], compute: Compute, answers: dict[int, Answered]
    ) -> None:
        indexes = sorted([*leading, *alone])
        if not indexes:
            return
        try:
            computed = compute(indexes)
            if len(computed) != len(indexes):
                raise RuntimeError(f"expected {len(indexes)} computed answers, found {len(computed)}")
        except BaseException as error:
            self._fail(leading.values(), error)
            self._count_all([*answers.values(), *[_FAILED["miss"]] * len(leading), *[_FAILED["bypass"]] * len(alone)])
            raise
        kept: list[tuple[Key, bytes]] = []
        for index, each in zip(indexes, computed, strict=True):
            flight = leading.get(index)
            answers[index] = Answered(each.value, "bypass" if flight is None else "miss")
            if flight is not None and self._end(flight, each):
                kept.append((flight.key, each.stored))
        if kept and self._shared is not None:
            self._shared.put(kept)

    def _wait(
        self,
        keys: Sequence[Key | None],
        waiting: dict[int, _Flight],
        compute: Compute,
        answers: dict[int, Answered],
    ) -> None:
        """Wait for what others compute, and compute what does not come or is not one for all."""
        deadline = time.monotonic() + self._wait_seconds
        alone: list[int] = []
        late: list[int] = []
        for index, flight in waiting.items():
            if not flight.done.wait(max(0.0, deadline - time.monotonic())):
                late.append(index)
            elif flight.error is not None:
                answers[index] = Answered(None, "coalesced", error=flight.error)
            elif flight.computed is None or not flight.computed.shared:
                alone.append(index)
            else:
                computed = flight.computed
                value = computed.value if computed.stored is None else computed.stored
                answers[index] = Answered(value, "hit" if flight.from_store else "coalesced", flight.age)
        leading: dict[int, _Flight] = {}
        if late:
            leading = self._take_over(keys, late, waiting, alone, answers)
        self._compute(leading, alone, compute, answers)

    def _take_over(
        self,
        keys: Sequence[Key | None],
        late: Sequence[int],
        waiting: dict[int, _Flight],
        alone: list[int],
        answers: dict[int, Answered],
    ) -> dict[int, _Flight]:
        """Compute in the place of who takes too long; who comes after waits for this thread."""
        leading: dict[int, _Flight] = {}
        with self._lock:
            for index in late:
                key = keys[index]
                assert key is not None
                entry = self._stored.get(key)
                if entry is not None:
                    answers[index] = Answered(entry.value, "hit", self._stored.clock() - entry.computed)
                elif self._under_way.get(key) in (None, waiting[index]):
                    leading[index] = self._under_way[key] = _Flight(key)
                else:  # another one of those who waited was faster; not a second wait
                    alone.append(index)
        return leading

    def _end(self, flight: _Flight, computed: Computed, age: float = 0.0, *, from_store: bool = False) -> bool:
        """Hand an answer to whoever waits for it, and store it; returns whether it may be stored elsewhere, too."""
        kept = False
        with self._lock:
            if self._under_way.get(flight.key) is flight:
                del self._under_way[flight.key]
            if computed.shared and computed.size is not None and flight.storable:
                kept = self._stored.put(flight.key, computed.stored, computed.size, age)
        flight.computed, flight.age, flight.from_store = computed, age, from_store
        flight.done.set()
        return kept

    def _fail(self, flights: Iterable[_Flight], error: BaseException) -> None:
        for flight in flights:
            if flight.done.is_set():
                continue
            with self._lock:
                if self._under_way.get(flight.key) is flight:
                    del self._under_way[flight.key]
            # Who waits is not to end as this thread does, which may have been told to.
            flight.error = error if isinstance(error, Exception) else None
            flight.done.set()

    def _count_all(self, answers: Iterable[Answered]) -> None:
        found: dict[str, int] = {}
        for each in answers:
            found[each.how] = found.get(each.how, 0) + 1
        for how, amount in found.items():
            self._count(f"result_cache_{how}", amount)


_FAILED = {"miss": Answered(None, "miss"), "bypass": Answered(None, "bypass")}


class _Flight:
    """A computation under way; `computed` and `error` are read after `done` is set."""

    __slots__ = ("age", "computed", "done", "error", "from_store", "key", "storable")

    def __init__(self, key: Key) -> None:
        self.key = key
        self.done = threading.Event()
        self.computed: Computed | None = None
        self.error: Exception | None = None
        self.age = 0.0
        self.from_store = False
        self.storable = True

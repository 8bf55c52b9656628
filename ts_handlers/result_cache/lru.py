"""A map from keys to values, bounded exactly in bytes; the least recently used goes first, and what is too old."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple

from ts_handlers.result_cache.base import Count, Key

OVERHEAD_BYTES = 512
"""What an entry takes beside its value: the key, two places in ordered dicts, the tuple. Measured by a test."""


class Entry(NamedTuple):
    """A value, its bytes with overhead, and when it was computed and ends, in seconds of the clock."""

    value: Any
    size: int
    computed: float
    ends: float


class ByteLRU:
    """An LRU with a bound in bytes and a time to live. Not thread-safe: its owner holds a lock.

    Parameters
    ----------
    max_bytes:
        Bound of all values with their overhead; never exceeded.
    ttl:
        Seconds for which a value is given out.
    count:
        Gets ``result_cache_evicted``, ``result_cache_expired`` and ``result_cache_oversize``.
    clock:
        Seconds that nobody sets back.

    Examples
    --------
    >>> lru = ByteLRU(2 * (OVERHEAD_BYTES + 10), ttl=60.0, count=lambda name, amount: print(name, amount))
    >>> [lru.put(key, key, 10) for key in (b"a", b"b")]
    [True, True]
    >>> lru.get(b"a").value
    b'a'
    >>> lru.put(b"c", b"c", 10), lru.get(b"b")
    result_cache_evicted 1
    (True, None)
    >>> lru.put(b"d", b"d", 10_000)
    result_cache_oversize 1
    False
    """

    def __init__(self, max_bytes: int, ttl: float, count: Count, clock: Callable[[], float] = time.monotonic) -> None:
        self.max_bytes = max_bytes
        self.ttl = ttl
        self.bytes = 0
        self.clock = clock
        self._count = count
        self._entries: OrderedDict[Key, Entry] = OrderedDict()
        self._by_age: OrderedDict[Key, None] = OrderedDict()  # in the order in which they were put

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: Key) -> Entry | None:
        """The entry of exactly this key, which counts as used now; None when there is none that is young enough."""
        entry = self._entries.get(key)
        if entry is None:
            return None
        if self.clock() >= entry.ends:
            self._remove(key)
            self._count("result_cache_expired", 1)
            return None
        self._entries.move_to_end(key)
        return entry

    def put(self, key: Key, value: Any, size: int, age: float = 0.0) -> bool:
        """Keep a value, in the place of the key's earlier one; False when it is too large or too old.

        Parameters
        ----------
        size:
            Bytes of the value.
        age:
            Seconds since it was computed.
        """
        if key in self._entries:
            self._remove(key)
        size += OVERHEAD_BYTES
        if size > self.max_bytes:
            self._count("result_cache_oversize", 1)
            return False
        if age >= self.ttl:
            return False
        now = self.clock()
        self._remove_expired(now)
        evicted = 0
        while self.bytes + size > self.max_bytes:
            self._remove(next(iter(self._entries)))
            evicted += 1
        if evicted:
            self._count("result_cache_evicted", evicted)
        self._entries[key] = Entry(value, size, now - age, now - age + self.ttl)
        self._by_age[key] = None
        self.bytes += size
        return True

    def clear(self) -> None:
        """Forget everything."""
        self._entries.clear()
        self._by_age.clear()
        self.bytes = 0

    def _remove(self, key: Key) -> None:
        self.bytes -= self._entries.pop(key).size
        del self._by_age[key]

    def _remove_expired(self, now: float) -> None:
        expired = 0
        while self._by_age and self._entries[key := next(iter(self._by_age))].ends <= now:
            self._remove(key)
            expired += 1
        if expired:
            self._count("result_cache_expired", expired)

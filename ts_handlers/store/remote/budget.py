"""How long one start may wait for a service that may be slow or dead: its calls, and what surrounds them, together.

A start holds one `TimeBudget` for each service that it asks (the remote store, a Redis server for leases). It wraps
what it waits for in ``with budget.counting():``. All time in such blocks counts: calls to the service, and imports,
locks and files beside them. Time outside of them, or in other threads (sending, heartbeats of a lease), does not count.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator

RESERVE_SECONDS = 0.05
"""Kept back of each budget for tidying up after a timeout; at most a tenth of the budget."""


class TimeBudget:
    """What a service may still cost one start.

    Parameters
    ----------
    seconds:
        The whole budget. It is also the limit of each call that does not count.

    Examples
    --------
    >>> budget = TimeBudget(10.0)
    >>> budget.left
    9.95
    >>> with budget.counting():
    ...     budget.is_counting
    True
    >>> budget.left < 9.95
    True
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._reserve = min(RESERVE_SECONDS, seconds / 10)
        self._spent = 0.0
        self._lock = threading.Lock()
        self._of_thread = threading.local()

    @property
    def is_counting(self) -> bool:
        """Whether the calling thread is in a block of `counting`."""
        return self._began is not None

    @property
    def left(self) -> float:
        """Seconds that are left, less the reserve; in a block of `counting`, what it has taken so far is subtracted."""
        began = self._began
        running = 0.0 if began is None else time.monotonic() - began
        return max(0.0, self.seconds - self._reserve - self._spent - running)

    @property
    def call_limit(self) -> float:
        """Seconds that a call may take which the calling thread begins now."""
        return self.left if self.is_counting else self.seconds

    @contextlib.contextmanager
    def counting(self) -> Iterator[None]:
        """Take the time that the block takes off the budget; a block within a block of the same thread adds nothing."""
        if self.is_counting:
            yield
            return
        self._of_thread.began = time.monotonic()
        try:
            yield
        finally:
            with self._lock:
                self._spent += time.monotonic() - self._of_thread.began
            self._of_thread.began = None

    def renew(self) -> None:
        """Begin again with the whole budget: the service has failed, and is not asked again before a pause is over."""
        with self._lock:
            self._spent = 0.0
        if self.is_counting:
            self._of_thread.began = time.monotonic()

    @property
    def _began(self) -> float | None:
        began: float | None = getattr(self._of_thread, "began", None)
        return began

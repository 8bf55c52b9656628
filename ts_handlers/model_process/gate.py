"""The gate through which calls reach the model: ordinary calls beside each other, retried calls one at a time.

A retried call may be the one that ended the last process; alone it cannot take other calls with it.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator


class Gate:
    """Lets ordinary calls run beside each other, and a retried one only alone.

    Parameters
    ----------
    on_count:
        Called with the number of calls that run, whenever it changes.
    """

    def __init__(self, on_count: Callable[[int], None]) -> None:
        self._changed = threading.Condition()
        self._running = 0
        self._retried = 0
        self._alone = False
        self._on_count = on_count

    @contextlib.contextmanager
    def beside_others(self) -> Iterator[None]:
        """An ordinary call; waits for retried ones."""
        with self._changed:
            while self._retried:
                self._changed.wait()
            self._count(1)
        try:
            yield
        finally:
            self._leave()

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """A retried call; waits until nothing else runs."""
        with self._changed:
            self._retried += 1
            while self._running:
                self._changed.wait()
            self._count(1)
        try:
            yield
        finally:
            with self._changed:
                self._retried -= 1
            self._leave()

    def _leave(self) -> None:
        with self._changed:
            self._count(-1)
            if self._retried or not self._running:
                self._changed.notify_all()

    def _count(self, change: int) -> None:
        self._running += change
        self._on_count(self._running)

"""The execution-context pool: k slots that share one set of weights, lent to one call at a time.

What a slot is depends on the backend: a TensorRT execution context with its stream and buffers
(`ts_handlers.execution.runner`), or a CUDA stream for a module (`ts_handlers.execution.slots`). The pool knows none of
that: it is threads and queues only.

Waiting calls are served in the order in which they came, and a slot that comes back goes straight to the first of
them, so that nobody overtakes. Of the free slots the one that has been idle for longest is lent first, so that warm-up
reaches each. A model that serves lends every thread the slot that it had last, where that is free: what libraries keep
for each pair of thread and stream (cuBLAS's workspaces of 32 MiB) is then kept once for each thread.
"""

from __future__ import annotations

import collections
import dataclasses
import threading
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Generic, TypeVar

from ts_handlers.errors import BusyError

S = TypeVar("S")

_CLOSED = "the model is being closed; send the request again"


@dataclasses.dataclass(frozen=True)
class PoolStats:
    """One moment of a pool.

    Attributes
    ----------
    size:
        Number of slots.
    in_use, waiting:
        Slots lent and calls waiting at this moment.
    high_water:
        Most slots that were lent at one moment.
    lent, waited, refused:
        Calls that got a slot, calls that had to wait for one, and calls that were refused after the longest wait.
    wait_seconds:
        What all calls waited together, refused ones included.
    """

    size: int = 0
    in_use: int = 0
    waiting: int = 0
    high_water: int = 0
    lent: int = 0
    waited: int = 0
    refused: int = 0
    wait_seconds: float = 0.0


class Ticket(Generic[S]):
    """A request for a slot: granted at once, granted later when a slot comes back, or refused.

    `slot` is valid once `granted` is true. `settled` exists in tickets that had to queue; it is set with the grant, or
    when the pool is closed.
    """

    __slots__ = ("granted", "settled", "slot")
    slot: S
    settled: threading.Event

    def __init__(self) -> None:
        self.granted = False


class ContextPool(Generic[S]):
    """Lends slots to calls.

    Parameters
    ----------
    slots:
        At least one; the pool never looks into them.
    wait_seconds:
        Longest wait of a call before it is refused.

    Examples
    --------
    >>> pool = ContextPool(["first", "second"], wait_seconds=1)
    >>> with pool.lend() as slot:
    ...     print(slot, pool.stats().in_use)
    first 1
    >>> pool.stats().in_use
    0
    """

    def __init__(self, slots: Sequence[S], wait_seconds: float) -> None:
        if not slots:
            raise ValueError("a pool needs at least one slot")
        self.size = len(slots)
        self.wait_seconds = wait_seconds
        self._free: collections.deque[S] = collections.deque(slots)
        self._queue: collections.deque[Ticket[S]] = collections.deque()
        self._lock = threading.Lock()
        self._idle = threading.Condition(self._lock)
        self._closed = False
        self._own: threading.local | None = None
        self._high_water = self._lent = self._waited = self._refused = 0
        self._wait_total = 0.0

    def lend(self) -> _Loan[S]:
        """A context manager that gives a slot for the block and takes it back.

        The calls inside must not lend from the same pool again: they could wait for themselves.

        Raises
        ------
        BusyError
            No slot came free within `wait_seconds`, or the pool is closed.
        """
        return _Loan(self)

    def request(self) -> Ticket[S]:
        """Ask for a slot without waiting; the ticket is granted at once or waits in the queue.

        `lend` is made of this, `cancel` and `give_back`.
        """
        ticket: Ticket[S] = Ticket()
        with self._lock:
            if self._closed:
                raise BusyError(_CLOSED)
            if self._free:  # then nobody waits: a slot that comes back goes to the first of the queue
                self._grant(ticket, self._choose())
            else:
                self._waited += 1
                ticket.settled = threading.Event()
                self._queue.append(ticket)
        return ticket

    def favour_own(self) -> None:
        """From now on lend every thread the slot that it had last, where that is free."""
        self._own = self._own or threading.local()

    def _choose(self) -> S:
        """A free slot, which is then no longer free."""
        if self._own is None:
            return self._free.popleft()
        slot: S | None = getattr(self._own, "slot", None)
        if slot is None or slot not in self._free:
            return self._free.popleft()
        self._free.remove(slot)
        return slot

    def cancel(self, ticket: Ticket[S]) -> bool:
        """Leave the queue; False if the ticket has been granted meanwhile (its slot is then the caller's)."""
        with self._lock:
            if ticket.granted:
                return False
            if ticket in self._queue:  # absent after `close`
                self._queue.remove(ticket)
            self._refused += 1
            return True

    def give_back(self, slot: S) -> None:
        """Return a slot, which goes to the first in the queue."""
        if self._own is not None:
            self._own.slot = slot
        with self._lock:
            if self._queue:
                first = self._queue.popleft()
                self._grant(first, slot)
                first.settled.set()
            else:
                self._free.append(slot)
                if self._closed:  # only `close` waits for it
                    self._idle.notify_all()

    def _grant(self, ticket: Ticket[S], slot: S) -> None:
        ticket.slot = self._count(slot)
        ticket.granted = True

    def _count(self, slot: S) -> S:
        self._lent += 1
        in_use = self.size - len(self._free)
        if in_use > self._high_water:
            self._high_water = in_use
        return slot

    def take(self) -> S:
        """Wait for a slot, which the caller has to give back; see `lend`."""
        with self._lock:
            if self._free and not self._closed:  # nearly always, and then there need be no ticket
                return self._count(self._choose())
        ticket = self.request()
        if ticket.granted:
            return ticket.slot
        started = time.perf_counter()
        try:
            ticket.settled.wait(self.wait_seconds)
        except BaseException:  # an interrupt; a slot granted meanwhile must not be lost
            if not self.cancel(ticket):
                self.give_back(ticket.slot)
            raise
        refused = self.cancel(ticket)
        with self._lock:
            self._wait_total += time.perf_counter() - started
        if refused:
            raise BusyError(
                _CLOSED
                if self._closed
                else f"no execution context came free within {self.wait_seconds:g} s ({self.size} in use); send the "
                "request again later, or raise contexts.count or contexts.wait_seconds in model-config.yaml"
            )
        return ticket.slot

    def close(self, timeout: float | None = None) -> bool:
        """Refuse every further call and those that wait, then wait until all slots are back.

        Returns
        -------
        Whether they were all back within `timeout` seconds.
        """
        with self._lock:
            self._closed = True
            while self._queue:
                self._queue.popleft().settled.set()  # without a slot: refused
            return self._idle.wait_for(lambda: len(self._free) == self.size, timeout)

    def stats(self) -> PoolStats:
        """Gauges and counters of this moment."""
        with self._lock:
            return PoolStats(
                size=self.size,
                in_use=self.size - len(self._free),
                waiting=len(self._queue),
                high_water=self._high_water,
                lent=self._lent,
                waited=self._waited,
                refused=self._refused,
                wait_seconds=self._wait_total,
            )


class _Loan(Generic[S]):
    """The context manager of `ContextPool.lend`; a class, which costs a call less than a generator."""

    __slots__ = ("_pool", "_slot")

    def __init__(self, pool: ContextPool[S]) -> None:
        self._pool = pool

    def __enter__(self) -> S:
        self._slot = self._pool.take()
        return self._slot

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.give_back(self._slot)

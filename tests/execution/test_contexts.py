"""The pool: in the order of arrival, bounded, nothing lost; as a state machine and with real threads."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from ts_handlers.errors import BusyError
from ts_handlers.execution import contexts
from ts_handlers.execution.contexts import ContextPool, Ticket


class PoolMachine(RuleBasedStateMachine):
    """Requests, cancellations and returns in any order, against lists."""

    @initialize(size=st.integers(1, 4))
    def make(self, size: int) -> None:
        self.pool: ContextPool[int] = ContextPool(range(size), wait_seconds=0)
        self.free = list(range(size))
        self.lent: list[int] = []
        self.queue: list[Ticket[int]] = []
        self.total = self.waited = self.refused = self.high = 0
        self.closed = False
        self.favours_own = False
        self.own: int | None = None

    @rule()
    def favour_own(self) -> None:
        self.pool.favour_own()
        self.favours_own = True

    @rule()
    def request(self) -> None:
        if self.closed:
            with pytest.raises(BusyError):
                self.pool.request()
            return
        ticket = self.pool.request()
        assert ticket.granted == bool(self.free)
        if self.free:
            # The one that this thread had last, or the one idle for longest.
            expected = self.own if self.own in self.free else self.free[0]
            assert ticket.slot == expected
            self.free.remove(ticket.slot)
            self._lend(ticket.slot)
        else:
            self.waited += 1
            self.queue.append(ticket)

    @precondition(lambda self: self.lent)
    @rule(data=st.data())
    def give_back(self, data: Any) -> None:
        slot = data.draw(st.sampled_from(self.lent))
        self.lent.remove(slot)
        self.pool.give_back(slot)
        if self.favours_own:
            self.own = slot
        if self.queue:
            first = self.queue.pop(0)
            assert first.granted
            assert first.settled.is_set()
            assert first.slot == slot
            self._lend(slot)
        else:
            self.free.append(slot)

    @precondition(lambda self: self.queue)
    @rule(data=st.data())
    def cancel(self, data: Any) -> None:
        ticket = data.draw(st.sampled_from(self.queue))
        self.queue.remove(ticket)
        assert self.pool.cancel(ticket)
        self.refused += 1

    @rule()
    def close(self) -> None:
        waiting, self.queue = self.queue, []
        assert self.pool.close(timeout=0) == (not self.lent)
        self.closed = True
        for ticket in waiting:
            assert ticket.settled.is_set()
            assert self.pool.cancel(ticket)
            self.refused += 1

    def _lend(self, slot: int) -> None:
        self.lent.append(slot)
        self.total += 1
        self.high = max(self.high, len(self.lent))

    @invariant()
    def counts(self) -> None:
        if not hasattr(self, "pool"):
            return
        stats = self.pool.stats()
        assert (stats.in_use, stats.waiting, stats.high_water) == (len(self.lent), len(self.queue), self.high)
        assert (stats.lent, stats.waited, stats.refused) == (self.total, self.waited, self.refused)
        assert len(set(self.lent) | set(self.free)) == stats.size
        assert not any(ticket.granted for ticket in self.queue)


TestPool = PoolMachine.TestCase
TestPool.settings = settings(max_examples=100, stateful_step_count=30, deadline=None)


@pytest.mark.parametrize("size", [1, 3])
def test_threads_never_share_a_slot(size: int) -> None:
    slots = [threading.Lock() for _ in range(size)]
    pool = ContextPool(slots, wait_seconds=60)

    def work(_: int) -> int:
        for _ in range(100):
            with pool.lend() as slot:
                assert slot.acquire(blocking=False), "two threads have the same slot"
                slot.release()
        return 100

    with ThreadPoolExecutor(8) as threads:
        done = sum(threads.map(work, range(8)))
    stats = pool.stats()
    assert (stats.lent, stats.in_use, stats.waiting, stats.refused) == (done, 0, 0, 0)
    assert stats.high_water <= size


def test_threads_keep_their_slots() -> None:
    """Threads that take turns get their own slot each time; without that they would get each other's."""
    pool: ContextPool[int] = ContextPool(range(3), wait_seconds=1)
    with ThreadPoolExecutor(1) as first, ThreadPoolExecutor(1) as second:

        def take(thread: ThreadPoolExecutor) -> int:
            def lend() -> int:
                with pool.lend() as slot:
                    return slot

            return thread.submit(lend).result()

        assert [take(thread) for thread in (first, second) * 3] == [0, 1, 2, 0, 1, 2]
        pool.favour_own()
        slots = [take(thread) for thread in (first, second) * 3]
        assert slots == slots[:2] * 3
        assert slots[0] != slots[1]


def test_every_slot_is_used_at_once() -> None:
    pool: ContextPool[None] = ContextPool([None] * 3, wait_seconds=60)
    together = threading.Barrier(3)

    def work(_: int) -> None:
        with pool.lend():
            together.wait(60)

    with ThreadPoolExecutor(3) as threads:
        list(threads.map(work, range(3)))
    assert pool.stats().high_water == 3


def test_a_call_that_waits_too_long_is_refused_and_counted() -> None:
    pool: ContextPool[int] = ContextPool([1], wait_seconds=0.01)
    with pool.lend():
        with pytest.raises(BusyError, match=r"no execution context came free within 0\.01 s.*contexts\.count"):
            pool.lend().__enter__()
        stats = pool.stats()
        assert (stats.waited, stats.refused, stats.waiting) == (1, 1, 0)
        assert stats.wait_seconds > 0
    with pool.lend() as slot:
        assert slot == 1


def test_a_failed_call_gives_its_slot_back() -> None:
    pool: ContextPool[int] = ContextPool([1], wait_seconds=0)
    for _ in range(3):
        with pytest.raises(KeyError), pool.lend():
            raise KeyError
    assert pool.stats().in_use == 0


@pytest.mark.parametrize("granted", [False, True])
def test_an_interrupt_while_waiting_loses_no_slot(granted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    pool: ContextPool[int] = ContextPool([1], wait_seconds=60)
    first = pool.request()

    class Interrupted(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            if granted:
                pool.give_back(first.slot)
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(contexts.threading, "Event", Interrupted)
        with pytest.raises(KeyboardInterrupt):
            pool.lend().__enter__()
    if not granted:
        pool.give_back(first.slot)
    stats = pool.stats()
    assert (stats.in_use, stats.waiting) == (0, 0)


def test_close_refuses_those_that_wait_and_waits_for_those_that_run() -> None:
    pool: ContextPool[int] = ContextPool([1], wait_seconds=60)
    running = pool.lend()
    slot = running.__enter__()
    with ThreadPoolExecutor(2) as threads:
        waiting = threads.submit(pool.lend().__enter__)
        while pool.stats().waiting == 0:
            pass
        closing = threads.submit(pool.close, 60)
        with pytest.raises(BusyError, match="being closed"):
            waiting.result(60)
        assert not closing.done()
        pool.give_back(slot)
        assert closing.result(60)
    with pytest.raises(BusyError, match="being closed"):
        pool.lend().__enter__()

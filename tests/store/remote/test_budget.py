"""What a service may still cost a start: which time counts, and what is kept back."""

from __future__ import annotations

import contextlib
import threading

import pytest

from ts_handlers.store.remote import budget as module
from ts_handlers.store.remote.budget import RESERVE_SECONDS, TimeBudget


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that stands still; its only item is the time in seconds."""
    clock = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: clock[0])
    return clock


def test_time_in_blocks_counts_and_time_outside_does_not(now: list[float]) -> None:
    budget = TimeBudget(10.0)
    assert (budget.left, budget.call_limit) == (10.0 - RESERVE_SECONDS, 10.0)
    with budget.counting():
        now[0] += 4.0
        assert budget.left == budget.call_limit == pytest.approx(6.0 - RESERVE_SECONDS)
        with budget.counting():
            now[0] += 1.0
        assert budget.left == pytest.approx(5.0 - RESERVE_SECONDS)
    now[0] += 100.0
    assert (budget.left, budget.call_limit) == (pytest.approx(5.0 - RESERVE_SECONDS), 10.0)
    with contextlib.suppress(ZeroDivisionError), budget.counting():
        now[0] += 9.0
        raise ZeroDivisionError
    assert budget.left == 0.0
    assert not budget.is_counting


def test_a_little_is_kept_back() -> None:
    assert TimeBudget(0.1).left == pytest.approx(0.09)


def test_other_threads_do_not_count(now: list[float]) -> None:
    budget, limits = TimeBudget(10.0), []
    with budget.counting():
        now[0] += 4.0
        thread = threading.Thread(target=lambda: limits.append(budget.call_limit))
        thread.start()
        thread.join()
    assert limits == [10.0]


def test_a_renewed_budget_is_whole_also_within_a_block(now: list[float]) -> None:
    budget = TimeBudget(10.0)
    with budget.counting():
        now[0] += 9.0
        budget.renew()
        assert budget.left == 10.0 - RESERVE_SECONDS
        now[0] += 1.0
    assert budget.left == pytest.approx(9.0 - RESERVE_SECONDS)

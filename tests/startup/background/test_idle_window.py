"""Idle windows: counts and order, never seconds."""

from __future__ import annotations

import threading

import pytest

from ts_handlers.startup.background import idle_window
from ts_handlers.startup.background.idle_window import wait_for_idle_window


class Clock:
    """Takes the place of the module `time`: a millisecond passes with each look at it."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        self.now += 0.001
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(idle_window, "time", made)
    return made


@pytest.mark.usefixtures("clock")
def test_waits_until_no_call_is_under_way_and_none_has_come() -> None:
    # Under way; over; another one has come and gone between two looks; then nothing.
    seen = [(True, 1), (False, 1), (False, 2)]
    looks: list[tuple[bool, int]] = []

    def calls() -> tuple[bool, int]:
        looks.append(seen[min(len(looks), len(seen) - 1)])
        return looks[-1]

    assert wait_for_idle_window(calls, lambda: False)
    assert looks[:3] == seen
    assert len(looks) >= 4  # the third starts the quiet time again
    assert set(looks[3:]) == {(False, 2)}


def test_a_server_that_never_pauses_is_not_waited_for_for_ever(clock: Clock) -> None:
    count = 0

    def calls() -> tuple[bool, int]:
        nonlocal count
        count += 1
        return False, count

    assert not wait_for_idle_window(calls, lambda: False)
    assert clock.now == pytest.approx(idle_window.PATIENCE_SECONDS, abs=0.01)
    assert count > 100


def test_gives_up_when_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(idle_window, "PATIENCE_SECONDS", 600.0)
    over = threading.Event()
    found: list[bool] = []
    waiting = threading.Thread(
        daemon=True, target=lambda: found.append(wait_for_idle_window(lambda: (True, 0), over.is_set))
    )
    waiting.start()
    assert found == []
    over.set()
    waiting.join(60)
    assert found == [False]

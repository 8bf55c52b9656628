"""The cycle collector while an entry is loaded: paused, and not made up for afterwards."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

from ts_handlers.system.cycle_collector import collection_paused

MANY = 50_000


@pytest.fixture(autouse=True)
def collector() -> Iterator[None]:
    gc.unfreeze()
    gc.collect()
    assert gc.isenabled()
    yield
    gc.unfreeze()


def test_what_is_made_meanwhile_is_not_walked() -> None:
    passes: list[int] = []
    gc.callbacks.append(lambda phase, facts: passes.append(facts["generation"]) if phase == "start" else None)
    try:
        with collection_paused():
            made = [[] for _ in range(MANY)]
        assert passes == []
        assert gc.get_count()[0] < MANY // 10  # objects in the young generation
    finally:
        gc.callbacks.pop()
    assert gc.isenabled()
    assert len(made) == MANY


def test_cycles_made_meanwhile_are_still_found() -> None:
    with collection_paused():
        cycle: list[object] = []
        cycle.append(cycle)
        del cycle
    assert gc.get_freeze_count() == 0
    assert gc.collect() >= 1


def test_what_was_frozen_stays_frozen() -> None:
    gc.freeze()
    before = gc.get_freeze_count()
    with collection_paused():
        pass
    assert gc.get_freeze_count() >= before > 0


def test_a_load_that_fails_keeps_nothing() -> None:
    with pytest.raises(ValueError, match="no"), collection_paused():
        raise ValueError("no")
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0


def test_a_collector_that_was_off_stays_off() -> None:
    gc.disable()
    try:
        with collection_paused():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()

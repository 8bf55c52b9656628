"""What is checked before it is served: the canary, its records, and artifacts that answer wrongly."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from tests.support.models import write_weights
from tests.support.starts import (
    Start,
    check,
    count_calls,
    counters,
    make_wrong,
)
from ts_handlers.errors import (
    CanaryError,
    QuarantinedError,
)
from ts_handlers.guard.quarantine import lift_quarantine, read_quarantines
from ts_handlers.store.upkeep.space import wait_for_room

pytestmark = pytest.mark.usefixtures("backend")


def test_canary_of_a_hit_is_the_first_warmup(start: Start, archive: Path) -> None:
    built = check(start(warmup=[{"batch": 3}, {"batch": 5}]), archive)
    assert built["canary"]["cases"] == [{"batch": 1}, {"batch": 4}, {"batch": 3}]
    assert check(start(warmup=[{"batch": 3}, {"batch": 5}]), archive)["canary"]["cases"] == [{"batch": 3}]


def test_new_weights_hit_and_are_checked_against_eager_once(start: Start, archive: Path) -> None:
    start()
    write_weights(archive, 7)
    second = check(start(), archive)
    assert counters(second) == {"hit": 1, "canary_recorded": 1}
    assert counters(check(start(), archive)) == {"hit": 1}


def test_recording_a_canary_keeps_their_number_bounded(
    start: Start, archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ts_handlers.store.upkeep.garbage.CANARIES_PER_KEY", 2)
    for seed in range(4):
        write_weights(archive, seed)
        start()
        wait_for_room()
    (folder,) = (tmp_path / "store" / "canaries").iterdir()
    assert len(list(folder.iterdir())) == 2
    assert counters(check(start(), archive)) == {"hit": 1}


def test_wrong_answers_are_never_served(
    start: Start, archive: Path, backend: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = backend.load

    def wrong(*arguments: Any) -> Any:
        loaded = load(*arguments)
        return dataclasses.replace(loaded, run=lambda tensors: loaded.run(tensors) * 1.01)

    start()
    monkeypatch.setattr(backend, "load", wrong)
    facts = check(start(), archive)
    assert facts["backend"] == "eager"
    assert "CanaryError" in facts["fallbacks"][0]["reason"]
    assert start(canary={"tolerance": 0.1}).outcome.backend == "aot_inductor"
    write_weights(archive, 7)
    with pytest.raises(CanaryError, match=r"relative error 0\.01"):
        start(strict=True)


def test_an_entry_that_answers_wrongly_is_tried_once_for_these_weights(
    start: Start, archive: Path, backend: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    start()
    with monkeypatch.context() as patched:
        make_wrong(backend, patched)
        start()
        calls = count_calls(backend, patched)
        again = check(start(), archive)
    assert calls == []
    assert counters(again) == {"quarantined": 1, "fallback": 1}
    assert "CanaryError: output 0: relative error 0.01" in again["fallbacks"][0]["reason"]
    (record,) = read_quarantines(tmp_path / "store")
    assert (record.phase, record.model, record.key in again["fallbacks"][0]["reason"]) == ("canary", "model", True)
    with pytest.raises(QuarantinedError, match="ts-handlers unquarantine"):
        start(strict=True)
    write_weights(archive, 7)
    assert check(start(), archive)["result"] == "hit"
    write_weights(archive, 0)
    assert check(start(), archive)["backend"] == "eager"
    assert lift_quarantine(tmp_path / "store", record.key) == [record]
    assert check(start(), archive)["result"] == "hit"


def test_a_build_that_answers_wrongly_is_neither_published_nor_repeated(
    start: Start, archive: Path, backend: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with monkeypatch.context() as patched:
        make_wrong(backend, patched)
        assert check(start(), archive)["backend"] == "eager"
    assert list((tmp_path / "store").rglob("manifest.json")) == []
    calls = count_calls(backend, monkeypatch)
    again = check(start(), archive)
    assert calls == []
    assert counters(again) == {"miss": 1, "quarantined": 1, "fallback": 1}
    write_weights(archive, 7)
    assert check(start(), archive)["result"] == "built"
    write_weights(archive, 0)
    assert check(start(), archive)["result"] == "hit"


def test_a_quarantined_entry_does_not_make_the_next_miss_final(
    start: Start, archive: Path, backend: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    start()
    make_wrong(backend, monkeypatch)
    start()
    facts = check(start(on_miss="fail", backends=["aot_inductor", "inductor", "eager"]), archive)
    assert [(fallback["backend"], fallback["reason"][:10]) for fallback in facts["fallbacks"]] == [
        ("aot_inductor", "Quarantine"),
        ("inductor", "MissError:"),
    ]
    assert facts["backend"] == "eager"

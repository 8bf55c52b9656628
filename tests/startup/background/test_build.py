"""``on_miss: background``: eager at once, one child process builds, its artifact is served."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.support.background_builds import (
    Start,
    background,
    begun,
    counters,
    settled,
)
from tests.support.models import archive_source
from ts_handlers import Settings, start_model

pytestmark = [pytest.mark.processes, pytest.mark.usefixtures("cheap_backends")]


def test_eager_at_once_then_swapped(
    start: Start, archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BUILD_UNTIL", str(tmp_path / "described"))
    model = start(outside="eager")
    first = model.describe()
    assert (first["backend"], first["result"]) == ("eager", "background")
    assert first["background"]["state"] in ("waiting", "building")
    told: list[str] = []
    background(model).when_done(lambda: told.append(background(model).describe()["state"]))
    (tmp_path / "described").touch()
    facts = settled(model, archive)
    assert (facts["backend"], facts["result"], facts["fallbacks"]) == ("aot_inductor", "swapped", ())
    assert counters(facts) == {"miss": 1, "build": 1, "background_build": 1, "swap": 1, "canary_recorded": 1}
    assert facts["canary"]["source"] == "record"
    assert facts["background"]["state"] == "swapped"
    assert {"lookup", "load", "canary", "warmup"} <= set(facts["background"]["phases_ms"])
    assert len(begun(tmp_path)) == 1
    assert os.getpid() not in begun(tmp_path)
    assert told == ["swapped"]
    background(model).when_done(lambda: told.append("late"))
    assert told == ["swapped", "late"]
    # A request outside the ranges is answered by the eager model that served before.
    monkeypatch.setattr("ts_handlers.model.archive.load_model_class", lambda path: pytest.fail("built again"))
    assert model(torch.randn(9, 4)).shape == (9, 3)
    again = start()
    assert (again.outcome.result, again.outcome.key, again.background) == ("hit", facts["key"], None)


@pytest.fixture
def _unusual_torch() -> Iterator[None]:
    """State of torch that is part of every key."""
    threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    torch.set_num_threads(threads + 1)
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_num_threads(threads)
    torch.set_float32_matmul_precision(precision)


@pytest.mark.usefixtures("_unusual_torch")
def test_child_tries_the_fallback_order_with_the_state_of_its_parent(
    start: Start, archive: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BUILD_ERROR", "no way to export")
    facts = settled(start(backends=["aot_inductor", "inductor", "eager"]), archive)
    assert (facts["backend"], facts["result"]) == ("inductor", "swapped")
    assert [fallback["backend"] for fallback in facts["fallbacks"]] == ["aot_inductor"]
    assert counters(facts) == {
        "miss": 1,
        "build": 1,
        "build_failed": 1,
        "fallback": 1,
        "canary_recorded": 1,
        "background_build": 1,
        "swap": 1,
    }


def test_a_hit_and_an_order_of_eager_alone_start_no_child(start: Start, archive: Path, tmp_path: Path) -> None:
    start(on_miss="compile")
    assert start().outcome.result == "hit"
    model = start_model(archive_source(archive), Settings(backends=("eager",), on_miss="background"))
    assert (model.outcome.result, model.background) == ("eager", None)
    assert begun(tmp_path) == [os.getpid()]

"""`samples`, `observe` and ``warmup: observed``: what tells a model's inputs where nobody declares them."""

from __future__ import annotations

from typing import Any

import pytest

from ts_handlers.errors import SettingsError
from ts_handlers.settings import Settings, parse_settings
from ts_handlers.settings.sections import ObserveSettings


def parse(**section: Any) -> Settings:
    return parse_settings({"handler": {"ts_handlers": section}})


def test_calls_are_observed_unless_that_is_switched_off() -> None:
    assert parse().observing == ObserveSettings() == ObserveSettings(100, 600.0)
    assert parse(observe=True).observing == ObserveSettings()
    assert parse(observe=False).observing is None
    assert parse(observe={"calls": 5}).observing == ObserveSettings(5, 600.0)
    assert parse(observe={"calls": None, "seconds": None}).observing == ObserveSettings(None, None)


def test_sizes_may_be_observed() -> None:
    assert parse(warmup="observed").warmup_sizes == ()
    assert parse().warmup_sizes == ()


@pytest.mark.parametrize(
    ("section", "parts"),
    [
        ({"samples": [""]}, ["handler.ts_handlers.samples[0]", "path of a file"]),
        ({"samples": ["a\0"]}, ["handler.ts_handlers.samples[0]"]),
        ({"samples": [{}]}, ["handler.ts_handlers.samples[0]", "mapping of a request's fields"]),
        ({"samples": [{"data": ""}]}, ["handler.ts_handlers.samples[0]"]),
        ({"samples": ["a"] * 65}, ["handler.ts_handlers.samples", "at most 64 files, found 65"]),
        ({"samples": "a.json"}, ["handler.ts_handlers.samples", "a.json"]),
        ({"observe": {"calls": 0}}, ["handler.ts_handlers.observe.calls", "at least 1, found 0"]),
        ({"observe": {"seconds": 0}}, ["handler.ts_handlers.observe.seconds", "above 0"]),
        ({"observe": {"seconds": 1e9}}, ["handler.ts_handlers.observe.seconds", "604800"]),
        ({"observe": {"call": 3}}, ["handler.ts_handlers.observe.call", "did you mean 'calls'?"]),
        ({"observe": "no"}, ["handler.ts_handlers.observe", "'no'"]),
        ({"observe": False, "warmup": "observed"}, ["handler.ts_handlers.warmup", "needs handler.ts_handlers.observe"]),
        ({"warmup": "seen"}, ["handler.ts_handlers.warmup", "'seen'", "observed"]),
    ],
)
def test_mistakes_name_their_place_and_the_remedy(section: dict[str, Any], parts: list[str]) -> None:
    with pytest.raises(SettingsError) as caught:
        parse(**section)
    assert [part for part in parts if part not in str(caught.value)] == [], str(caught.value)


def test_the_files_of_samples_are_told_once_each() -> None:
    assert parse(samples=["a.json", {"data": "b.jpg", "k": "a.json"}]).sample_files == ("a.json", "b.jpg")

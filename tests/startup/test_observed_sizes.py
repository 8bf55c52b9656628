"""``warmup: observed``: the sizes that calls had most often are warmed up from the next start on."""

from __future__ import annotations

import threading

import pytest
import torch

from tests.support import file_backend
from tests.support.starts import Start
from ts_handlers import CompiledModel

pytestmark = pytest.mark.usefixtures("backend")


def call(model: CompiledModel, *rows: int) -> None:
    for count in rows:
        model(torch.zeros(count, 4))
    for thread in threading.enumerate():
        if thread.name == "ts_handlers-sizes":
            thread.join()


def test_frequent_sizes_are_warmed_up(start: Start, backend: file_backend.FileBackend) -> None:
    options = {"warmup": "observed", "observe": {"calls": 6, "seconds": None}}
    model = start(**options)
    assert model._target.settings.warmup == ()
    call(model, 3, 3, 5, 3, 5)
    assert start(**options)._target.settings.warmup == ()
    call(model, 2)
    again = start(**options)
    assert again._target.settings.warmup == ({"batch": 3}, {"batch": 5}, {"batch": 2})
    assert (again.outcome.result, again.outcome.key) == ("hit", model.outcome.key)
    call(again, *[8] * 10)
    assert start(**options)._target.settings.warmup == again._target.settings.warmup  # once known they stay


def test_other_inputs_have_other_sizes(start: Start, backend: file_backend.FileBackend) -> None:
    options = {"warmup": "observed", "observe": {"calls": 1, "seconds": None}}
    call(start(**options), 3)
    assert start(**options)._target.settings.warmup == ({"batch": 3},)
    assert start(**options, dimensions={"batch": {"min": 1, "max": 2}})._target.settings.warmup == ()


def test_eager_calls_are_counted_too(start: Start) -> None:
    options = {"warmup": "observed", "observe": {"calls": 2, "seconds": None}, "backends": ["eager"]}
    call(start(**options), 3, 4)
    assert start(**options)._target.settings.warmup == ({"batch": 3}, {"batch": 4})

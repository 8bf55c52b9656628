"""`SharedModel` in one process with the test: what can be shared, and what it answers."""

from __future__ import annotations

import datetime
from pathlib import Path

import pytest
import torch

from tests.support.models import archive_source, eager_model, settings_of
from ts_handlers import ModuleSource, start_model
from ts_handlers.errors import ModelError, SettingsError
from ts_handlers.model_process.shared_model import SharedModel

pytestmark = pytest.mark.processes


def test_a_recipe_that_another_process_would_read_differently_is_refused(archive: Path) -> None:
    source = archive_source(archive)
    for value in (datetime.date(2026, 1, 1), {1: "a"}):
        source._recipe = {**source._recipe, "config": {"value": value}}
        with pytest.raises(SettingsError, match=r"across_workers: 'model' cannot be described.*put it into quotes"):
            start_model(source, settings_of(backends=["eager"], contexts={"across_workers": True}))


def test_what_only_this_process_knows_cannot_be_shared() -> None:
    with pytest.raises(SettingsError, match=r"across_workers: no other process can make 'linear'"):
        start_model(
            ModuleSource("linear", torch.nn.Linear(4, 3)),
            settings_of(backends=["eager"], contexts={"across_workers": True}),
        )


def test_without_declared_inputs_there_is_nothing_to_send(archive: Path) -> None:
    with pytest.raises(ModelError, match=r"needs the model's inputs.*handler\.ts_handlers\.inputs"):
        start_model(archive_source(archive), settings_of({"backends": ["eager"]}, contexts={"across_workers": True}))


def test_requests_outside_the_ranges_are_answered_eagerly_where_that_is_set(archive: Path) -> None:
    settings = settings_of(backends=["eager"], outside="eager", contexts={"across_workers": True})
    model = start_model(archive_source(archive), settings)
    assert isinstance(model, SharedModel)
    rows = torch.ones(20, 4)
    assert torch.allclose(model(rows)["y"], eager_model(archive)(rows)["y"], atol=1e-6)
    assert model.describe()["counters"]["outside_eager"] == 1
    assert model.metrics.counters["outside_eager"] == 1
    model.close()


def test_answers_are_the_callers_own(archive: Path) -> None:
    model = start_model(archive_source(archive), settings_of(backends=["eager"], contexts={"across_workers": True}))
    first = model(torch.ones(2, 4))["y"]
    copy = first.clone()
    model(torch.zeros(2, 4))
    assert torch.equal(first, copy)
    assert model.layer.weight.shape == (3, 4)  # the eager module, built here
    model.close()

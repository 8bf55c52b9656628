"""`start_model` and `captured_start`: which model is started where, and what another process learns of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.support.models import archive_source, settings_of
from ts_handlers import CompiledModel, ServedModel, start_model
from ts_handlers.model.archive import ArchiveSource
from ts_handlers.start import captured_start


@pytest.fixture
def source(archive: Path) -> ArchiveSource:
    return archive_source(archive)


def test_a_model_is_started_here_when_nothing_else_is_said(source: ArchiveSource) -> None:
    model = start_model(source, settings_of(backends=["eager"]))
    assert isinstance(model, CompiledModel)
    assert isinstance(model, ServedModel)


def test_a_captured_start_starts_nothing_and_ends_the_block(source: ArchiveSource) -> None:
    settings = settings_of(backends=["eager"], contexts={"across_workers": True})
    reached = []
    with captured_start() as found:
        reached.append("before")
        start_model(source, settings, "cuda:1")
        reached.append("behind")
    assert reached == ["before"]
    assert [tuple(made) for made in found] == [(source, settings, torch.device("cuda", 1), False)]
    assert isinstance(start_model(source, settings_of(backends=["eager"])), CompiledModel)


def test_a_handler_that_catches_exceptions_does_not_hide_a_captured_start(source: ArchiveSource) -> None:
    with captured_start() as found:
        try:
            start_model(source, settings_of(backends=["eager"]))
        except Exception:
            pytest.fail("taken for a failure")
        finally:
            cleaned_up = True
    assert len(found) == 1
    assert cleaned_up


def test_an_error_after_the_start_is_of_no_interest_and_one_before_it_is_raised(source: ArchiveSource) -> None:
    with captured_start() as found:
        try:
            start_model(source, settings_of(backends=["eager"]))
        finally:
            raise KeyError("cleaning up fails")
    assert len(found) == 1
    with pytest.raises(KeyError, match="before"), captured_start():
        raise KeyError("before")


def test_a_block_that_starts_nothing_finds_nothing() -> None:
    with captured_start() as found:
        pass
    assert found == []

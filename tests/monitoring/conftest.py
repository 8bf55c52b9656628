"""A folder for series, and no recording left over from another test."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from ts_handlers.monitoring.recorder import stop_recording


@pytest.fixture(autouse=True)
def _no_recording() -> Iterator[None]:
    stop_recording()
    yield
    stop_recording()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where processes record."""
    made = tmp_path / "metrics"
    made.mkdir(mode=0o700)
    return made

"""Fixtures of starts with the cheap backend."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support.models import archive_source, settings_of
from tests.support.starts import Start
from ts_handlers import CompiledModel, start_model


@pytest.fixture
def start(archive: Path, tmp_path: Path) -> Start:
    """Starts an archive's model on a store of the test's own."""

    def run(directory: Path = archive, **changes: Any) -> CompiledModel:
        section = {"store": str(tmp_path / "store"), "backends": ["aot_inductor", "eager"], **changes}
        return start_model(archive_source(directory), settings_of(**section))

    return run

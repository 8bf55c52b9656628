"""Fixtures of background builds: the cheap backends, here and in build processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Register
from tests.support import file_backend
from tests.support.background_builds import CHILD_SITE, Start
from tests.support.models import archive_source, settings_of
from ts_handlers import CompiledModel, start_model
from ts_handlers.model.archive import ArchiveSource


@pytest.fixture
def cheap_backends(monkeypatch: pytest.MonkeyPatch, register: Register, tmp_path: Path) -> None:
    """The cheap backend here and in build processes, which log their builds."""
    register("aot_inductor", "tests.support.file_backend:BACKEND")
    register("inductor", "tests.support.second_backend:BACKEND")
    monkeypatch.setattr(file_backend, "BACKEND", file_backend.FileBackend())
    monkeypatch.syspath_prepend(str(CHILD_SITE))
    monkeypatch.setenv("BUILD_LOG", str(tmp_path / "builds"))


@pytest.fixture
def start(archive: Path, tmp_path: Path, cheap_backends: None) -> Start:
    def run(retry_failed: bool = False, source: ArchiveSource | None = None, **changes: Any) -> CompiledModel:
        section = {"store": str(tmp_path / "store"), "backends": ["aot_inductor", "eager"], "on_miss": "background"}
        section["background"] = {"nice": 0}  # the machine may be busy
        settings = settings_of(**{**section, **changes})
        return start_model(source or archive_source(archive), settings, retry_failed=retry_failed)

    return run

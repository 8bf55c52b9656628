"""Fixtures of handlers: the cheap backend, a context of TorchServe and a handler that has started on it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Register
from tests.store.conftest import redis_port, redis_url  # noqa: F401


@pytest.fixture
def cheap_backend(register: Register) -> None:
    """The cheap backend in place of ``aot_inductor``."""
    register("aot_inductor", "tests.support.file_backend:BACKEND")


@pytest.fixture
def context(archive: Path, tmp_path: Path) -> Any:
    """The context of a worker that has just loaded the archive."""
    from tests.support.handlers import make_context

    return make_context(archive, tmp_path / "store")


@pytest.fixture
def handler(context: Any, cheap_backend: None) -> Any:
    """A handler that has started on `context`."""
    from ts_handlers import CompiledHandler

    made = CompiledHandler()
    made.initialize(context)
    return made

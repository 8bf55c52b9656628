"""Running `ts-handlers` in this process, on a store that real starts have filled."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Register
from tests.support.file_backend import FileBackend
from tests.support.models import archive_source, settings_of
from ts_handlers import start_model

typer_testing = pytest.importorskip("typer.testing", reason="typer is not installed")


@dataclasses.dataclass
class Result:
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


@pytest.fixture
def run() -> Callable[..., Result]:
    """Run the command with these arguments."""
    from ts_handlers.cli.app import make_app

    def run(*arguments: object) -> Result:
        result = typer_testing.CliRunner().invoke(make_app(), [str(argument) for argument in arguments])
        return Result(result.exit_code, result.stdout, result.stderr)

    return run


@pytest.fixture
def filled(archive: Path, tmp_path: Path, register: Register) -> Path:
    """A store with one entry of the model ``linear``, used once."""
    register("aot_inductor", f"{FileBackend.__module__}:BACKEND")
    settings = settings_of(store=str(tmp_path / "store"), backends=["aot_inductor"], strict=True)
    assert start_model(archive_source(archive, name="linear"), settings).outcome.result == "built"
    assert start_model(archive_source(archive, name="linear"), settings).outcome.result == "hit"
    return tmp_path / "store"

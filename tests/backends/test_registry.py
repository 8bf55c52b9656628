"""A backend of another package is one file and one line."""

from __future__ import annotations

import importlib
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.models import archive_source, eager_model, settings_of
from ts_handlers import start_model
from ts_handlers.backends import get_backend
from ts_handlers.errors import SettingsError
from ts_handlers.settings import backend_names, register_backend

SCRIPT = """
import torch

from ts_handlers.backends.base import Built
from ts_handlers.execution.base import Loaded
from ts_handlers.key import fingerprint


class ScriptBackend:
    name = "script"
    persistent = True
    needs_eager_module = False

    def bakes_weights(self, target):
        return True

    def options(self, target):
        return {}

    def toolchain(self, target):
        return fingerprint.toolchain(target.device.type)

    def build(self, target, workspace):
        signature = target.require_signature()
        inputs = [tensor.to(target.device) for tensor in signature.generate(target.example_sizes)]
        with workspace.phase("export"):
            torch.jit.trace(target.eager(), inputs).save(workspace.directory / "model.ts")
        with workspace.phase("script.look"):
            pass
        return Built({"file": "model.ts"})

    def load(self, target, directory, description):
        module = torch.jit.load(directory / description["file"], map_location=target.device)

        def run(tensors):
            with torch.inference_mode():
                return module(*tensors)

        return Loaded(run, target.require_signature())

    def substitute(self, settings, error):
        return None


BACKEND = ScriptBackend()
"""
"""That of the docstring of `ts_handlers.backends.base`, in a file."""


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder on the search path that holds the backend's module, and its name in the registry given back."""
    folder = tmp_path / "site"
    folder.mkdir()
    (folder / "script_backend.py").write_text(SCRIPT, "utf-8")
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delitem(importlib.import_module("sys").modules, "script_backend", raising=False)
    return folder


@pytest.fixture
def forgotten() -> Any:
    """Forgets the backend afterwards, however it became known."""
    yield
    register_backend("script", None)


def serve(archive: Path, store: Path) -> dict[str, Any]:
    model = start_model(
        archive_source(archive), settings_of(store=str(store), backends=["script", "eager"], strict=True)
    )
    x = torch.ones(3, 4)
    with torch.inference_mode():
        torch.testing.assert_close(model(x), eager_model(archive)(x))
    return model.describe()


@pytest.mark.usefixtures("forgotten")
@pytest.mark.parametrize("by_object", [False, True])
def test_a_registered_backend_serves(by_object: bool, package: Path, archive: Path, tmp_path: Path) -> None:
    location = importlib.import_module("script_backend").BACKEND if by_object else "script_backend:BACKEND"
    assert register_backend("script", location) is None
    built, hit = (serve(archive, tmp_path / "store") for _ in range(2))
    assert [(facts["backend"], facts["result"]) for facts in (built, hit)] == [("script", "built"), ("script", "hit")]
    assert set(built["build_ms"]) == {"export", "script.look"}


@pytest.mark.usefixtures("forgotten")
def test_a_backend_of_an_entry_point_is_found(package: Path, archive: Path, tmp_path: Path) -> None:
    facts = package / "script_backend-1.0.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: script-backend\nVersion: 1.0\n", "utf-8")
    (facts / "entry_points.txt").write_text("[ts_handlers.backends]\nscript = script_backend:BACKEND\n", "utf-8")
    importlib.invalidate_caches()
    assert "script" in backend_names()
    assert serve(archive, tmp_path / "store")["backend"] == "script"


def test_a_known_name_can_be_given_to_another_backend(register: Callable[[str, Any], None]) -> None:
    other: Any = object()
    register("inductor", other)
    assert get_backend("inductor") is other


def test_unknown_names_are_refused_with_the_list() -> None:
    with pytest.raises(
        SettingsError, match=r"no backend has this name \(value: 'script'\); expected one of tensorrt, .*eager"
    ):
        settings_of(backends=["script"])
    with pytest.raises(SettingsError, match="no backend is called 'script'; known are tensorrt, torch_tensorrt, "):
        get_backend("script")


def test_the_docstring_has_the_same_backend() -> None:
    from ts_handlers.backends import base

    assert base.__doc__ is not None
    example = textwrap.dedent(base.__doc__.partition("::\n\n")[2].partition("\n    register_backend")[0])

    def lines(text: str) -> set[str]:
        return {line.partition("  #")[0].strip() for line in text.splitlines()}

    assert lines(example) <= lines(SCRIPT)

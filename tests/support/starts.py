"""Starts with the cheap backend: what they say of themselves, and backends that fail or answer wrongly."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.models import eager_model
from ts_handlers import CompiledModel

ROWS = torch.arange(8.0).reshape(2, 4)
Start = Callable[..., CompiledModel]


def check(model: CompiledModel, archive: Path) -> dict[str, Any]:
    """The model answers as the eager one does; returns what it says about itself."""
    with torch.inference_mode():
        assert torch.allclose(model(ROWS), eager_model(archive)(ROWS), atol=1e-5)
    facts = model.describe()
    json.dumps(facts)
    return facts


def counters(facts: dict[str, Any]) -> dict[str, int]:
    return {name: count for name, count in facts["counters"].items() if count}


def count_calls(backend: Any, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the backend's methods, as they are called from now on."""
    calls: list[str] = []
    for name in ("build", "load"):
        method = getattr(backend, name)

        def counted(*arguments: Any, name: str = name, method: Any = method) -> Any:
            calls.append(name)
            return method(*arguments)

        monkeypatch.setattr(backend, name, counted)
    return calls


def make_wrong(backend: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Artifacts answer wrongly from now on."""
    load = backend.load

    def wrong(*arguments: Any) -> Any:
        loaded = load(*arguments)
        return dataclasses.replace(loaded, run=lambda tensors: loaded.run(tensors) * 1.01)

    monkeypatch.setattr(backend, "load", wrong)


def fail_builds(backend: Any, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    """Builds fail from now on."""

    def fail(*arguments: Any) -> Any:
        raise error

    monkeypatch.setattr(backend, "build", fail)


def write_while_building(backend: Any, monkeypatch: pytest.MonkeyPatch, size: int) -> list[str]:
    """Builds leave `size` more bytes in their folder; returns a list that gets the files they found there."""
    build, found = backend.build, []

    def large(target: Any, workspace: Any) -> Any:
        found.append([path.name for path in workspace.directory.iterdir()])
        built = build(target, workspace)
        (workspace.directory / "large").write_bytes(bytes(size))
        return built

    monkeypatch.setattr(backend, "build", large)
    return found

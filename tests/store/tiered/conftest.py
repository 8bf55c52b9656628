"""Hosts that share a remote store, each with a store of its own."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from tests.support.models import archive_source, eager_model, settings_of
from ts_handlers import CompiledModel, start_model
from ts_handlers.settings.sections import RemoteSettings
from ts_handlers.store.tiered.store import TieredStore

ROWS = torch.arange(8.0).reshape(2, 4)


@dataclasses.dataclass
class Fleet:
    """Starts the archive's model on hosts, each with a store of its own below `root`."""

    archive: Path
    root: Path
    remote: dict[str, Any]
    model: str = "model"

    def start(self, host: str, trust: dict[str, Any] | None = None, **remote: Any) -> CompiledModel:
        section = {"store": str(self.root / host), "backends": ["aot_inductor", "eager"], "trust": trust or {}}
        settings = settings_of(**section, remote={**self.remote, **remote})
        model = start_model(archive_source(self.archive, name=self.model), settings)
        assert isinstance(model.store, TieredStore)
        assert model.store.write_back.wait(300)
        with torch.inference_mode():
            assert torch.allclose(model(ROWS), eager_model(self.archive)(ROWS), atol=1e-5)
        json.dumps(model.describe())
        return model


@pytest.fixture
def fleet(archive: Path, tmp_path: Path, remote_settings: RemoteSettings) -> Fleet:
    return Fleet(archive, tmp_path, msgspec.to_builtins(remote_settings))


@pytest.fixture
def shared(archive: Path, tmp_path: Path, folder: RemoteSettings) -> Fleet:
    """A fleet that shares the folder ``remote``."""
    return Fleet(archive, tmp_path, msgspec.to_builtins(folder))


def trust(keys: Path, accepted: str, signing: str | None = None) -> dict[str, Any]:
    section: dict[str, Any] = {"public_keys": [str(keys / f"{name}.pub") for name in accepted]}
    return section if signing is None else {**section, "signing_key": str(keys / f"{signing}.key")}


def counters(model: CompiledModel) -> dict[str, int]:
    return {name: count for name, count in model.metrics.counters.items() if count}


def notes(model: CompiledModel) -> str:
    assert model.store is not None
    return "\n".join(model.store.notes)


def objects(fleet: Fleet, kind: str) -> list[Path]:
    return sorted(path for path in (fleet.root / "remote" / kind).rglob("*") if path.is_file())


BUILT = {"miss": 1, "build": 1, "canary_recorded": 1, "remote_miss": 2, "write_back": 2}
FETCHED = {"hit": 1, "remote_hit": 1}

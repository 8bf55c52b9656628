"""Archives, artifact stores and servers of the serving tests. Every test of this folder carries the mark `serving`.

What a start did is counted three ways: by the counters that `describe` shows, by the start records in the server's
log, one per worker, and by the entries published in the store.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from archives import ROWS, ArchiveFactory

from ts_handlers.testing import TorchServe

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    missing = [name for name in ("ts", "model_archiver") if importlib.util.find_spec(name) is None]
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.serving)
            if missing:
                item.add_marker(pytest.mark.skip(reason=f"not installed: {', '.join(missing)}"))


def published(store: Path) -> list[Path]:
    """Manifests of the entries in a store."""
    return sorted((store / "entries").rglob("manifest.json"))


def starts(server: TorchServe, model: str) -> list[dict[str, Any]]:
    """The start record of each worker of a model, in the order of the log."""
    records = [json.loads(line.partition("ts_handlers start ")[2]) for line in _start_lines(server.log())]
    return [record for record in records if record["model"] == model]


def _start_lines(log: str) -> list[str]:
    return [line for line in log.splitlines() if "ts_handlers start {" in line]


@pytest.fixture(scope="session")
def archives(tmp_path_factory: pytest.TempPathFactory) -> ArchiveFactory:
    """Writes archives into the model store that all tests share."""
    return ArchiveFactory(tmp_path_factory.mktemp("model_store"), tmp_path_factory.mktemp("sources"))


@pytest.fixture(scope="session")
def tiny(archives: ArchiveFactory) -> str:
    """Name of the tiny model's archive, built once."""
    archives.tiny("tiny", seed=1)
    return "tiny"


ServerFactory = Callable[..., TorchServe]


@pytest.fixture(scope="session")
def make_server(archives: ArchiveFactory, tmp_path_factory: pytest.TempPathFactory) -> ServerFactory:
    """A server on the tests' model store and the given artifact store, not started: use it in a `with`."""

    def make(models: Sequence[str], store: Path, **options: Any) -> TorchServe:
        env = {"TS_HANDLERS_CACHE": str(store), **options.pop("env", {})}
        directory = tmp_path_factory.mktemp("server")
        return TorchServe(archives.model_store, models, env=env, directory=directory, **options)

    return make


@dataclasses.dataclass(frozen=True)
class FirstStart:
    """What was seen of the tiny model's first start on an empty store."""

    store: Path
    description: dict[str, Any]
    starts: list[dict[str, Any]]
    entries: int
    answer: Any


@pytest.fixture(scope="session")
def first_start(tiny: str, make_server: ServerFactory, tmp_path_factory: pytest.TempPathFactory) -> FirstStart:
    """The tiny model's first start; happens once in a test run. Its store is then used by copies only."""
    store = tmp_path_factory.mktemp("first") / "store"
    with make_server([tiny], store) as server:
        server.wait_ready(tiny)
        answer = server.predict(tiny, ROWS)
        assert answer.status == 200, answer.text
        return FirstStart(store, server.describe(tiny), starts(server, tiny), len(published(store)), answer.json())


@pytest.fixture
def warm_store(first_start: FirstStart, tmp_path: Path) -> Path:
    """A copy of the store that the first start filled, as on a new host."""
    return copy_store(first_start, tmp_path / "store")


def copy_store(first_start: FirstStart, target: Path) -> Path:
    """Copy the store that the first start filled."""
    shutil.copytree(first_start.store, target)
    return target

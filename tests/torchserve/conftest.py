"""Archives, artifact stores and servers of the serving tests. Every test of this folder carries the mark `serving`."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import filelock
import pytest

from tests.support.torchserve_archives import ROWS, ArchiveFactory
from tests.support.torchserve_records import FirstStart, ServerFactory, copy_store, published, starts
from ts_handlers.testing import TorchServe

HERE = Path(__file__).parent


@pytest.hookimpl(wrapper=True, tryfirst=True)  # before the tests are put in order by their marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> Iterator[None]:
    missing = [name for name in ("ts", "model_archiver") if importlib.util.find_spec(name) is None]
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.serving)
            if missing:
                item.add_marker(pytest.mark.skip(reason=f"not installed: {', '.join(missing)}"))
    return (yield)


@pytest.fixture(scope="session")
def archives(tmp_path_factory: pytest.TempPathFactory) -> ArchiveFactory:
    """Writes archives into the model store that all tests share."""
    return ArchiveFactory(tmp_path_factory.mktemp("model_store"), tmp_path_factory.mktemp("sources"))


@pytest.fixture(scope="session")
def tiny(archives: ArchiveFactory) -> str:
    """Name of the tiny model's archive, built once."""
    archives.tiny("tiny", seed=1)
    return "tiny"


@pytest.fixture(scope="session")
def make_server(archives: ArchiveFactory, tmp_path_factory: pytest.TempPathFactory) -> ServerFactory:
    """A server on the tests' model store and the given artifact store, not started: use it in a `with`."""

    def make(models: Sequence[str], store: Path, **options: Any) -> TorchServe:
        env = {"TS_HANDLERS_CACHE": str(store), **options.pop("env", {})}
        directory = tmp_path_factory.mktemp("server")
        return TorchServe(archives.model_store, models, env=env, directory=directory, **options)

    return make


@pytest.fixture(scope="session")
def first_start(tiny: str, make_server: ServerFactory, tmp_path_factory: pytest.TempPathFactory) -> FirstStart:
    """The tiny model's first start; happens once in a test run. Its store is then used by copies only."""
    base = tmp_path_factory.getbasetemp()
    shared = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "first-start"
    shared.mkdir(exist_ok=True)
    facts = shared / "facts.json"
    with filelock.FileLock(shared / "lock"):  # the other workers of pytest wait here
        if not facts.exists():
            seen = start_first(tiny, make_server, Path(tempfile.mkdtemp(dir=shared)) / "store")
            facts.write_text(json.dumps({**dataclasses.asdict(seen), "store": str(seen.store)}), "utf-8")
        read = json.loads(facts.read_text("utf-8"))
        return FirstStart(**{**read, "store": Path(read["store"])})


def start_first(tiny: str, make_server: ServerFactory, store: Path) -> FirstStart:
    """Start the tiny model on an empty store."""
    with make_server([tiny], store) as server:
        server.wait_ready(tiny)
        answer = server.predict(tiny, ROWS)
        assert answer.status == 200, answer.text
        return FirstStart(store, server.describe(tiny), starts(server, tiny), len(published(store)), answer.json())


@pytest.fixture
def warm_store(first_start: FirstStart, tmp_path: Path) -> Path:
    """A copy of the store that the first start filled, as on a new host."""
    return copy_store(first_start, tmp_path / "store")

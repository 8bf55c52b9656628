"""Fixtures of the model's process: an archive whose model does what goes wrong, and workers that end with the test."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.models import write_archive
from tests.support.workers import MODEL, Start, Worker


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The processes' folders lie in a temporary folder of the test's own."""
    path = tmp_path / "tmp"
    path.mkdir()
    monkeypatch.setenv("TMPDIR", str(path))
    monkeypatch.setattr("tempfile.tempdir", None)
    return path


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    return write_archive(tmp_path / "archive", MODEL)


@pytest.fixture
def start(archive: Path, tmp_path: Path) -> Iterator[Start]:
    """Starts workers, which are ended with the test."""
    workers: list[Worker] = []

    def start_worker(**settings: object) -> Worker:
        worker = Worker(archive, tmp_path / "store", tmp_path / f"worker{len(workers)}.log", **settings)
        workers.append(worker)
        return worker

    yield start_worker
    for worker in workers:
        worker.kill()


@pytest.fixture
def hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file: calls with negative values last until it is removed."""
    path = tmp_path / "hold"
    path.touch()
    monkeypatch.setenv("HOLD", str(path))
    return path

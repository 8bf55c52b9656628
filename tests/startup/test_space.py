"""Quotas from model-config.yaml, kept after a start that has published; digests of weights between starts."""

from __future__ import annotations

import gc
import threading
import zipfile
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Register
from tests.support.file_backend import FileBackend
from tests.support.models import archive_source, settings_of, write_archive
from ts_handlers import CompiledModel, ExportedSource, start_model
from ts_handlers.errors import MissError, SettingsError
from ts_handlers.key.digests import digest_file
from ts_handlers.store.local import verified
from ts_handlers.store.local.layout import VERIFIED
from ts_handlers.store.upkeep.scan import scan_entries

ONE = {"store": {"entries": 1}}


@pytest.fixture(autouse=True)
def _file_backend(register: Register) -> None:
    register("aot_inductor", f"{FileBackend.__module__}:BACKEND")


def start(tmp_path: Path, batch: int, **changes: Any) -> CompiledModel:
    """Start the archive with another largest batch, which is another key; waits for what runs in the background."""
    archive = tmp_path / "archive"
    if not archive.exists():
        write_archive(archive)
    dimensions = {"batch": {"min": 1, "max": batch}}
    settings = settings_of(
        store=str(tmp_path / "store"), backends=["aot_inductor"], strict=True, dimensions=dimensions, **changes
    )
    model = start_model(archive_source(archive), settings)
    for thread in threading.enumerate():
        if thread.name == "ts_handlers-space":
            thread.join()
    return model


def keys(tmp_path: Path) -> set[str]:
    return {entry.key for entry in scan_entries(tmp_path / "store")}


def test_start_that_publishes_keeps_the_quota_and_its_own_entry(tmp_path: Path) -> None:
    for batch in (8, 9):
        first = start(tmp_path, batch, space=ONE)
        key = first.outcome.key
        assert first.outcome.result == "built"
        del first
        gc.collect()
    assert keys(tmp_path) == {key}
    second = start(tmp_path, 10, space={"per_model": {"bytes": "1 KiB"}})
    assert keys(tmp_path) == {second.outcome.key}
    assert second.metrics.counters["evicted"] == 1


def test_entry_of_a_model_that_is_served_stays(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    served = start(tmp_path, 8)
    other = start(tmp_path, 9, space=ONE)
    assert keys(tmp_path) == {served.outcome.key, other.outcome.key}
    assert "the store exceeds its quota of entries: 2 of 1" in caplog.text
    assert other.metrics.counters["evicted"] == 0


def test_hit_collects_nothing(tmp_path: Path) -> None:
    start(tmp_path, 8)
    gc.collect()
    (tmp_path / "store" / "trash" / "evicted-x").mkdir(parents=True)
    assert start(tmp_path, 8, space={"store": {"entries": 0}}).outcome.result == "hit"
    assert (tmp_path / "store" / "trash" / "evicted-x").exists()


@pytest.mark.parametrize(
    ("space", "parts"),
    [
        ({"store": {"bytes": "20 apples"}}, ["space.store.bytes", "'20 apples'", "20GiB"]),
        ({"per_model": {"bytes": -1}}, ["space.per_model.bytes", "-1"]),
        ({"per_model": {"entries": -1}}, ["space.per_model.entries", "at least 0", "-1"]),
        ({"store": {"files": 3}}, ["space.store.files", "bytes, entries, inodes"]),
    ],
)
def test_impossible_quotas_are_refused_with_path_value_and_remedy(space: dict[str, Any], parts: list[str]) -> None:
    with pytest.raises(SettingsError) as error:
        settings_of(space=space)
    for part in parts:
        assert part in str(error.value)


@pytest.fixture
def settled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A store that is there already, and files that count as written long ago."""
    monkeypatch.setattr(verified, "RACY_SECONDS", 0.0)
    (tmp_path / "store").mkdir(mode=0o700)
    return str(tmp_path / "store")


def hashes_of_weights(archive: Path, hashed: list[str]) -> int:
    """How often the weights were hashed through `verified` since the last call."""
    count = hashed.count(digest_file(archive / "model.pt"))
    hashed.clear()
    return count


def test_start_hashes_weights_again_only_when_they_may_have_changed(
    archive: Path, settled: str, hashed: list[str]
) -> None:
    for seed in (0, 1):
        write_archive(archive, seed=seed)
        for expected in (1, 0, 0):
            model = start_model(archive_source(archive), settings_of(store=settled, backends=["aot_inductor"]))
            assert model.outcome.backend == "aot_inductor"
            assert hashes_of_weights(archive, hashed) == expected


def test_start_of_an_exported_program_remembers_its_digest(tmp_path: Path, settled: str, hashed: list[str]) -> None:
    path = tmp_path / "model.pt2"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("model/anything", "which no build needs to read")
    settings = settings_of(store=settled, backends=["aot_inductor"], on_miss="fail")
    for expected in (1, 0):
        with pytest.raises(MissError):
            start_model(ExportedSource("m", path), settings)
        assert hashed.count(digest_file(path)) == expected
        hashed.clear()


def test_start_that_verifies_always_remembers_no_digest(archive: Path, settled: str, hashed: list[str]) -> None:
    settings = settings_of(store=settled, backends=["aot_inductor"], verify="always")
    source = archive_source(archive)
    start_model(source, settings)
    assert source.weights_digest() == digest_file(archive / "model.pt")
    assert not hashed
    assert not (Path(settled) / VERIFIED).exists()


def test_eager_start_hashes_no_weights(archive: Path, settled: str, hashed: list[str]) -> None:
    start_model(archive_source(archive), settings_of(store=settled, backends=["eager"]))
    for thread in threading.enumerate():
        if thread.name == "ts_handlers-digest":
            thread.join()
    assert not hashed

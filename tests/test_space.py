"""Quotas from model-config.yaml, kept after a start that has published; digests of weights between starts."""

from __future__ import annotations

import gc
import threading
from pathlib import Path
from typing import Any

import pytest
from file_backend import FileBackend
from models import archive_source, settings_of, write_archive

import ts_handlers.backends
from ts_handlers import CompiledModel, start_model
from ts_handlers.digests import digest_file
from ts_handlers.errors import SettingsError
from ts_handlers.store import verified
from ts_handlers.store.opening import weights_digester
from ts_handlers.store.scan import scan_entries

ONE = {"store": {"entries": 1}}


@pytest.fixture(autouse=True)
def _file_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ts_handlers.backends._MODULES, "aot_inductor", FileBackend.__module__)


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


def test_weights_are_hashed_again_only_when_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verified, "RACY_SECONDS", 0.0)
    archive = write_archive(tmp_path / "archive")
    changed = settings_of(store=str(tmp_path / "store"))
    (tmp_path / "store").mkdir(mode=0o700)
    expected = digest_file(archive / "model.pt")
    assert archive_source(archive, digest_file=weights_digester(changed)).weights_digest() == expected
    monkeypatch.setattr(verified, "digest_stream", lambda file: "hashed again")
    assert archive_source(archive, digest_file=weights_digester(changed)).weights_digest() == expected
    always = settings_of(store=str(tmp_path / "store"), verify="always")
    assert archive_source(archive, digest_file=weights_digester(always)).weights_digest() == expected
    write_archive(archive, seed=1)
    assert archive_source(archive, digest_file=weights_digester(changed)).weights_digest() == "hashed again"
    assert archive_source(archive, digest_file=weights_digester(always)).weights_digest() not in (
        expected,
        "hashed again",
    )

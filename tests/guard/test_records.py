"""Records on disk: what was written before is read, and what is written now has the fields that it always had."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest

from ts_handlers.guard.markers import Marker
from ts_handlers.guard.quarantine import read_quarantines, record_files, write_record
from ts_handlers.guard.records import FailedBuild, Quarantine, decode_record, encode_record, stored_fields

QUARANTINE = {
    "key": "ab" * 16,
    "model": "model",
    "backend": "aot_inductor",
    "phase": "canary",
    "seal": "5e",
    "runtime": {"torch": "2"},
    "reason": "ValueError: too far",
    "details": "",
    "weights": "w1",
    "canary": "tolerance=None seed=0",
    "time": "2026-01-01T00:00:00Z",
    "host": "host",
    "pid": 7,
    "kind": "",
    "count": 1,
    "failed_at": 0.0,
    "held_seconds": 0.0,
    "unbuildable": True,
}
FAILED_BUILD = {
    **QUARANTINE,
    "phase": "build",
    "seal": "",
    "weights": "",
    "canary": "",
    "reason": "BuildError: no",
    "kind": "deterministic",
    "count": 2,
    "failed_at": 5.0,
    "held_seconds": 7200.0,
    "unbuildable": False,
}


@pytest.mark.parametrize(("stored", "kind"), [(QUARANTINE, Quarantine), (FAILED_BUILD, FailedBuild)])
def test_what_was_stored_before_is_read_and_stored_alike(stored: dict[str, object], kind: type, tmp_path: Path) -> None:
    record = decode_record(json.dumps(stored).encode())
    assert isinstance(record, kind)
    assert stored_fields(record) == json.loads(encode_record(record)) == stored
    assert write_record(tmp_path, record)
    ((path, again),) = record_files(tmp_path)
    assert (again, path.name) == (record, record.file_name)


def test_the_names_of_files_are_those_of_before() -> None:
    """So that a record of the same thing replaces one that an earlier version has written."""
    names = [decode_record(json.dumps(stored).encode()).file_name for stored in (QUARANTINE, FAILED_BUILD)]
    assert names == [f"{'ab' * 16}-867e037b2d02.json", f"{'ab' * 16}-build-c738634b3b29.json"]


def test_a_record_without_the_later_fields_is_a_quarantine(tmp_path: Path) -> None:
    early = {name: QUARANTINE[name] for name in ("key", "model", "backend", "phase", "seal", "runtime", "reason")}
    (tmp_path / "quarantine").mkdir()
    (tmp_path / "quarantine" / f"{'ab' * 16}-0.json").write_text(json.dumps(early))
    (record,) = read_quarantines(tmp_path)
    assert isinstance(record, Quarantine)
    assert (record.digest, record.count, record.retry) == ("5e", 1, "when lifted")


def test_markers_keep_the_names_of_their_fields() -> None:
    marker = Marker("k", "m", "b", "load", "5e", {}, 3, None, None, None, "2026", "host", 7)
    stored = msgspec.to_builtins(marker)
    assert (stored["seal"], stored["generation"]) == ("5e", 3)
    assert msgspec.convert(stored, Marker) == marker

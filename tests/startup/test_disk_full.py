"""A disk that is full while building."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from tests.support.marks import needs_root
from tests.support.starts import (
    Start,
    check,
    counters,
    write_while_building,
)
from ts_handlers.guard.quarantine import read_quarantines

pytestmark = pytest.mark.usefixtures("backend")


@needs_root
def test_a_disk_that_is_full_while_building_names_folder_space_and_remedy(
    start: Start, archive: Path, backend: Any, monkeypatch: pytest.MonkeyPatch, small_disk: Path
) -> None:
    store = small_disk / "store"
    found = write_while_building(backend, monkeypatch, 100_000)
    facts = check(start(store=str(store)), archive)
    assert (facts["backend"], len(found)) == ("eager", 1)
    reason = facts["fallbacks"][0]["reason"]
    assert re.search(rf"the build had \d+ bytes in {store}/staging, \d+ bytes in /", reason), reason
    assert "ts-handlers gc --max-bytes" in reason
    assert "TS_HANDLERS_CACHE" in reason
    (record,) = read_quarantines(store)
    assert (record.kind, "No space left on device" in record.reason) == ("circumstantial", True)
    assert counters(check(start(store=str(store)), archive)) == {"miss": 1, "build_skipped": 1, "fallback": 1}
    assert len(found) == 1


@needs_root
def test_a_build_that_finds_the_disk_full_makes_room_and_goes_on(
    start: Start, archive: Path, backend: Any, monkeypatch: pytest.MonkeyPatch, small_disk: Path
) -> None:
    left = small_disk / "store" / "trash" / "evicted-0"
    left.mkdir(parents=True, mode=0o700)
    (left / "large").write_bytes(bytes(36_000))  # of an eviction that did not finish
    found = write_while_building(backend, monkeypatch, 24_000)
    facts = check(start(store=str(small_disk / "store")), archive)
    assert (facts["backend"], facts["result"]) == ("aot_inductor", "built")
    assert found == [[], []]  # the second attempt began with an empty folder
    assert facts["counters"]["build_failed"] == 0
    assert not left.exists()
    assert check(start(store=str(small_disk / "store")), archive)["result"] == "hit"

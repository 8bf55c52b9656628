"""Builds with the real compiler on a disk that is full, in processes of their own: torch's writer may abort."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.support.marks import needs_root
from tests.support.subprocesses import run_python
from ts_handlers.guard.quarantine import read_quarantines
from ts_handlers.guard.records import FailedBuild
from ts_handlers.system.files import RememberingWriter

START = """
    import json, sys
    from tests.support.models import archive_source, settings_of
    from ts_handlers import start_model
    settings = settings_of(store=sys.argv[2], backends=["aot_inductor", "eager"])
    print(json.dumps(start_model(archive_source(sys.argv[1]), settings).describe()))
"""


def start(archive: Path, store: Path, temporary: Path) -> dict[str, Any]:
    out = run_python(START, archive, store, TMPDIR=str(temporary))
    facts: dict[str, Any] = json.loads(out.splitlines()[-1])
    return facts


@needs_root
@pytest.mark.compile
@pytest.mark.parametrize("full", ["store", "temporary"])
def test_a_full_disk_ends_no_process_and_the_build_goes_on_when_there_is_room(
    full: str, archive: Path, small_disk: Path, tmp_path: Path
) -> None:
    (tmp_path / "temporary").mkdir()
    store = small_disk / "store" if full == "store" else tmp_path / "store"
    temporary = small_disk if full == "temporary" else tmp_path / "temporary"
    facts = start(archive, store, temporary)
    (fallback,) = facts["fallbacks"]
    assert (facts["backend"], facts["counters"]["build_failed"]) == ("eager", 1)
    assert fallback["reason"].startswith("DiskFullError: no space left: the build had ")
    (record,) = read_quarantines(store)
    assert isinstance(record, FailedBuild)
    assert record.kind == "circumstantial"
    assert [Path(folder).is_relative_to(small_disk) for folder in record.free] == [True]
    subprocess.run(["mount", "-o", "remount,size=1g", str(small_disk)], check=True)
    facts = start(archive, store, temporary)
    assert (facts["backend"], facts["result"], facts["counters"]["build"]) == ("aot_inductor", "built", 1)
    assert read_quarantines(store) == []


@needs_root
def test_a_writer_that_remembers_raises_only_when_it_is_asked(small_disk: Path) -> None:
    with RememberingWriter(small_disk / "file") as file:
        assert file.write(bytes(1 << 20)) == 1 << 20
        assert file.write(b"more") == 4
        with pytest.raises(OSError, match="No space left on device"):
            file.check()

"""Processes of one host that want the same artifact: one builds, the others wait or take over."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from tests.support.background_builds import (
    SERVE,
    begun,
    ended,
    serve,
    stays_eager,
    wait_for_end,
)
from tests.support.subprocesses import finish

pytestmark = [pytest.mark.processes, pytest.mark.usefixtures("cheap_backends")]


def test_three_processes_build_once_and_all_swap(archive: Path, tmp_path: Path) -> None:
    processes = [serve(archive, tmp_path, BUILD_UNTIL=str(tmp_path / "all serve")) for _ in range(3)]
    (tmp_path / "all serve").touch()
    facts = [ended(process, archive) for process in processes]
    assert len(begun(tmp_path)) == 1
    assert [each["result"] for each in facts] == ["swapped"] * 3
    for counter in ("background_build", "build"):
        assert sum(each["counters"][counter] for each in facts) == 1


def test_failure_is_shared_by_those_who_waited(archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BUILD_ERROR", "no way to export")
    processes = [serve(archive, tmp_path, BUILD_UNTIL=str(tmp_path / "all serve")) for _ in range(2)]
    (tmp_path / "all serve").touch()
    facts = [ended(process, archive) for process in processes]
    assert len(begun(tmp_path)) == 1
    for each in facts:
        stays_eager(each, "aot_inductor: BuildError: no way to export")
    assert sorted(each["counters"]["background_build"] for each in facts) == [0, 1]


def test_waiter_takes_over_when_the_server_that_builds_dies_and_the_child_dies_with_it(
    archive: Path, tmp_path: Path
) -> None:
    holder = serve(archive, tmp_path, BUILD_UNTIL=str(tmp_path / "never"))
    while not begun(tmp_path):
        assert holder.poll() is None
        time.sleep(0.02)
    waiter = serve(archive, tmp_path)
    holder.kill()
    holder.communicate()
    facts = ended(waiter, archive)
    assert facts["result"] == "swapped"
    orphan, builder = begun(tmp_path)
    assert orphan != builder
    wait_for_end(orphan)


def test_leaving_the_interpreter_ends_the_child(archive: Path, tmp_path: Path) -> None:
    leave = "while not begun(): time.sleep(0.02)\n    sys.exit()"
    code = SERVE.replace("model.background.wait()", leave)
    code = "    import os, time\n    begun = lambda: os.path.exists(log) and os.path.getsize(log)\n" + code
    code = "    log = " + repr(str(tmp_path / "builds")) + "\n" + code
    finish(serve(archive, tmp_path, code, BUILD_UNTIL=str(tmp_path / "never")))
    (child,) = begun(tmp_path)
    wait_for_end(child)
    # It was asked to end, and said so: the crash guard does not count this against the build.
    (marker,) = (tmp_path / "store" / "guards").iterdir()
    assert "file_backend.py" in marker.read_text().partition("\n")[2]

"""When the process that workers share starts, ends, and is another one."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from tests.support.models import LINEAR, archive_source, settings_of, write_archive
from tests.support.workers import (
    MODEL,
    ROWS,
    Start,
    check_answer,
    is_alive,
    wait_until,
)
from ts_handlers import start_model

pytestmark = pytest.mark.processes


def test_the_process_outlives_the_worker_that_started_it_and_logs_to_another(start: Start, archive: Path) -> None:
    first = start(backends=["eager"])
    process = first.ready()
    second = start(backends=["eager"])
    assert second.ready() == process
    first.kill()
    assert wait_until(lambda: second.describe()["facts"]["across_workers"]["workers"] == [second.pid])
    check_answer(second.call(ROWS), archive, ROWS)
    logs = {os.readlink(f"/proc/{process}/fd/{number}") for number in (1, 2)}
    theirs = {os.readlink(f"/proc/{second.pid}/fd/{number}") for number in (1, 2)}
    assert logs == theirs
    third = start(backends=["eager"])
    assert third.ready() == process


def test_the_process_ends_when_no_worker_is_left(start: Start, archive: Path) -> None:
    workers = [start(), start()]
    process = workers[0].ready()
    workers[1].ready()
    workers[0].end()
    workers[1].kill()
    assert is_alive(process)  # for one that a server starts again
    again = start()
    assert again.ready() == process
    again.end()
    assert wait_until(lambda: not is_alive(process))


@pytest.mark.compile
def test_one_start_is_counted_for_all_workers(start: Start, tmp_path: Path, archive: Path) -> None:
    (archive / "model.py").write_text(LINEAR)
    settings = {"store": str(tmp_path / "store"), "backends": ["aot_inductor"]}
    start_model(archive_source(archive), settings_of(**settings))
    told = []
    process = set()
    for _ in range(3):
        worker = start(backends=["aot_inductor"], strict=True)
        process.add(worker.ready())
        told.append(worker.started["counters"])
        description = worker.describe()
        assert description["beyond_budget"] == []
        facts = description["facts"]
        assert (facts["backend"], facts["result"]) == ("aot_inductor", "hit")
        assert facts["counters"]["hit"] == 1
        assert facts["counters"]["build"] == 0
    assert len(process) == 1
    assert sum(counters["hit"] for counters in told) == 1


def test_a_start_that_fails_is_made_once_and_told_to_all(start: Start, archive: Path, tmp_path: Path) -> None:
    marks = tmp_path / "marks"
    marks.mkdir()
    code = f"""
    import os, time, torch
    open({str(marks)!r} + f"/{{os.getpid()}}", "w").close()
    while not os.path.exists({str(tmp_path / "all look")!r}):
        time.sleep(0.01)
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            raise ValueError("this model cannot be made")
        def forward(self, x):
            return x
    """
    write_archive(archive, code, seed=None)
    (archive / "model.pt").unlink()
    torch.save({}, archive / "model.pt")
    workers = [start(), start(), start()]
    for worker in workers:
        worker.looks()
    (tmp_path / "all look").touch()
    for worker in workers:
        line = worker.line()
        assert line["failed"] == "ModelError"
        assert "this model cannot be made" in line["message"]
    assert len(list(marks.iterdir())) == 1


def test_a_process_that_dies_at_each_start_is_not_started_for_ever(
    archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ts_handlers.model_process import launch

    monkeypatch.setattr(launch, "STARTS", 2)
    marks = tmp_path / "marks"
    marks.mkdir()
    mark = f'import os, torch\nopen({str(marks)!r} + f"/{{os.getpid()}}", "w").close()\nos.abort()\n'
    (archive / "model.py").write_text(mark + LINEAR)
    with pytest.raises(launch.LaunchError, match=r"died 2 times while it started, last was killed by SIGABRT"):
        start_model(archive_source(archive), settings_of(backends=["eager"], contexts={"across_workers": True}))
    assert len(list(marks.iterdir())) == 2


def test_a_start_goes_on_when_the_worker_that_asked_for_it_dies(start: Start, archive: Path, tmp_path: Path) -> None:
    marks = tmp_path / "marks"
    marks.mkdir()
    go = tmp_path / "second looks"
    mark = f"""
import os, time
open({str(marks)!r} + f"/{{os.getpid()}}", "w").close()
while not os.path.exists({str(go)!r}):
    time.sleep(0.01)
"""
    (archive / "model.py").write_text(mark + MODEL)
    first = start()
    assert wait_until(lambda: bool(list(marks.iterdir())))
    first.kill()
    second = start()
    second.looks()
    go.touch()
    process = second.ready()
    assert [path.name for path in marks.iterdir()] == [str(process)]
    check_answer(second.call(ROWS), archive, ROWS)


def test_other_files_are_another_model(start: Start, archive: Path) -> None:
    first = start()
    before = first.ready()
    write_archive(archive, MODEL, seed=5)
    second = start()
    assert second.ready() != before
    check_answer(second.call(ROWS), archive, ROWS)
    check_old = first.call(ROWS)
    assert check_old["y"] != second.call(ROWS)["y"]


def test_files_that_do_not_shape_the_model_do_not_part_the_workers(start: Start, archive: Path) -> None:
    """Such as a log that a handler writes into the model's folder, and what Python leaves there for a moment."""
    first = start(key_files_ignored=["scratch/*"])
    process = first.ready()
    cache = archive / "__pycache__"
    cache.mkdir(exist_ok=True)
    (archive / "scratch").mkdir()
    for path in (archive / "handler.log", cache / "model.cpython-311.pyc.140245", archive / "scratch" / "tile"):
        path.write_bytes(b"x")
    second = start(key_files_ignored=["scratch/*"])
    assert second.ready() == process


def test_what_the_settings_name_outside_the_archive_parts_the_workers(start: Start, tmp_path: Path) -> None:
    path = tmp_path / "outside"
    path.write_text("1")
    first = start(key_files=[str(path)])
    process = first.ready()
    assert start(key_files=[str(path)]).ready() == process
    path.write_text("2")
    assert start(key_files=[str(path)]).ready() != process

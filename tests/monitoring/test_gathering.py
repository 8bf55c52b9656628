"""No count is lost and none counts twice, however processes end."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from ts_handlers.monitoring.catalogue import BY_NAME, CAPS, OTHER
from ts_handlers.monitoring.gathering import TOTALS, gather
from ts_handlers.monitoring.process_file import FIRST_BYTES, MAGIC, ProcessFile, read_series
from ts_handlers.monitoring.recorder import MANY_FILES, Recording, begin_recording, folder_of, recorder_of

SWAPS = "swaps_total", ("m",)
CONTEXTS = "contexts", ("m",)


def files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.series"))


def in_child(work: Callable[[], None], ending: int = signal.SIGKILL) -> None:
    """Do some work in a forked child that is then killed."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
        finally:
            os.kill(os.getpid(), ending)
    os.waitpid(pid, 0)


@pytest.mark.processes
def test_what_a_killed_process_counted_is_kept_and_counts_once(folder: Path) -> None:
    for amount in (2, 3):
        in_child(lambda amount=amount: ProcessFile(folder).add(SWAPS, amount) or None)  # type: ignore[misc]
    living = ProcessFile(folder)
    living.add(SWAPS, 10)
    assert len(files(folder)) == 3
    for _ in range(3):
        assert gather([folder]).series[SWAPS] == [15.0]
    assert files(folder) == [living.path]
    living.add(SWAPS)
    assert gather([folder]).series[SWAPS] == [16.0]
    living.close()
    assert gather([folder]).series[SWAPS] == [16.0]
    assert files(folder) == []


@pytest.mark.processes
def test_an_exporter_that_dies_before_it_removes_what_it_took_in_counts_it_once(folder: Path, tmp_path: Path) -> None:
    in_child(lambda: ProcessFile(folder).add(SWAPS, 2) or None)  # type: ignore[func-returns-value]
    (file,) = files(folder)
    shutil.copy2(file, tmp_path / "kept")
    gather([folder])
    shutil.copy2(tmp_path / "kept", file)
    assert gather([folder]).series[SWAPS] == [2.0]
    assert files(folder) == []
    assert gather([folder]).series[SWAPS] == [2.0]


def test_gauges_of_processes_that_are_gone_go(folder: Path) -> None:
    one, other = ProcessFile(folder), ProcessFile(folder)
    one.set(CONTEXTS, 2)
    other.set(CONTEXTS, 3)
    one.set(("last_start_seconds", ("m", "hit")), 4)
    other.set(("last_start_seconds", ("m", "hit")), 9)
    found = gather([folder]).series
    assert (found[CONTEXTS], found["last_start_seconds", ("m", "hit")]) == ([5.0], [9.0])
    other.close()
    assert gather([folder]).series[CONTEXTS] == [2.0]


def test_a_read_only_folder_is_only_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ts_handlers.monitoring import gathering

    file = ProcessFile(folder)
    file.add(SWAPS, 2)
    file.close()
    monkeypatch.setattr(gathering, "_lock_totals", lambda folder: None)
    assert [gather([folder]).series[SWAPS] for _ in range(2)] == [[2.0], [2.0]]
    assert len(files(folder)) == 1


def test_damaged_files_are_left_out_and_hurt_nobody(folder: Path) -> None:
    good = ProcessFile(folder)
    good.add(SWAPS)
    (folder / "1-1-a.series").write_bytes(b"\xff" * 100)
    (folder / "1-1-b.series").write_bytes(MAGIC + (10**6).to_bytes(8, "little") + b"\xff" * 100)
    (folder / "1-1-c.series").write_bytes(b"")
    (folder / TOTALS).write_text('{"series": 3}')
    assert gather([folder]).series[SWAPS] == [1.0]
    assert [path.name for path in folder.glob(f"{TOTALS}.*")] == [f"{TOTALS}.damaged"]


def test_a_folder_that_others_may_write_is_not_read(folder: Path) -> None:
    ProcessFile(folder).add(SWAPS)
    folder.chmod(0o777)
    assert gather([folder]).series == {}


def test_label_values_are_bounded_in_a_process_and_over_all(folder: Path) -> None:
    cap = CAPS["kind"]
    for process in range(3):
        recording = Recording(ProcessFile(folder))
        for number in range(2 * cap):
            recording.add("request_errors_total", ("m", f"{process}-{number}"))
        own, _ = read_series(recording.file.path)
        del own["series_dropped_total", ()]
        assert len(own) == cap + 1
        assert own["request_errors_total", ("m", OTHER)] == [float(cap)]
        recording.file.close()
    found = gather([folder])
    del found.series["series_dropped_total", ()]
    assert len(found.series) == cap + 1
    assert sum(numbers[0] for numbers in found.series.values()) == 3 * 2 * cap
    again = gather([folder]).series
    del again["series_dropped_total", ()]
    assert again == found.series


def test_a_file_grows_and_what_has_no_room_is_counted(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ts_handlers.monitoring import process_file

    monkeypatch.setattr(process_file, "MOST_BYTES", 2 * FIRST_BYTES)
    monkeypatch.setitem(CAPS, "model", 10_000)
    recording = Recording(ProcessFile(folder))
    for number in range(3000):
        recording.add("swaps_total", (f"model {number}",))
    own, _ = read_series(recording.file.path)
    dropped = own["series_dropped_total", ()][0]
    assert 0 < dropped == 3000 - sum(name == "swaps_total" for name, _ in own)
    assert recording.file.path.stat().st_size == 2 * FIRST_BYTES
    recording.add("swaps_total", ("model 0",))
    assert read_series(recording.file.path)[0]["swaps_total", ("model 0",)] == [2.0]


def test_a_histogram_counts_each_value_in_one_bucket(folder: Path) -> None:
    recording = Recording(ProcessFile(folder))
    bounds = BY_NAME["batch_seconds"].buckets
    for value in (0.0, bounds[0], bounds[0] * 1.01, bounds[-1] * 2):
        recording.observe("batch_seconds", ("m",), value)
    numbers = read_series(recording.file.path)[0]["batch_seconds", ("m",)]
    assert (numbers[0], numbers[1], numbers[len(bounds)], sum(numbers[:-1])) == (2.0, 1.0, 1.0, 4.0)
    assert numbers[-1] == pytest.approx(bounds[0] * 2.01 + bounds[-1] * 2)


@pytest.mark.processes
def test_a_forked_child_writes_nothing_into_its_parents_file(tmp_path: Path) -> None:
    begin_recording(tmp_path)
    parent = recorder_of("m")
    assert parent is not None

    def child() -> None:
        parent.counted("swap", 1, ())
        begin_recording(tmp_path)
        own = recorder_of("m")
        assert own is not None
        own.counted("swap", 2, ())

    in_child(child)
    parent.counted("swap", 4, ())
    assert len(files(folder_of(tmp_path))) == 2
    assert gather([folder_of(tmp_path)]).series[SWAPS] == [6.0]
    assert len(files(folder_of(tmp_path))) == 1  # the parent's, whose lock the child has not taken along


def test_without_an_exporter_the_folder_stays_small(tmp_path: Path) -> None:
    folder = folder_of(tmp_path)
    folder.mkdir(mode=0o700, parents=True)
    for _ in range(MANY_FILES + 5):
        file = ProcessFile(folder)
        file.add(SWAPS)
        file.close()
    begin_recording(tmp_path)
    assert len(files(folder)) == 1
    assert gather([folder]).series[SWAPS] == [MANY_FILES + 5.0]
    assert len(json.loads((folder / TOTALS).read_text())["folded"]) == MANY_FILES + 5


@pytest.mark.processes
def test_the_sum_only_grows_while_processes_count_and_die_and_several_exporters_look(folder: Path) -> None:
    def count() -> None:
        file = ProcessFile(folder)
        for _ in range(200):
            file.add(SWAPS)

    seen: list[list[float]] = [[], []]
    over = threading.Event()

    def look(numbers: list[float]) -> None:
        while not over.is_set():
            numbers.append(gather([folder]).series.get(SWAPS, [0.0])[0])

    exporters = [threading.Thread(target=look, args=(numbers,)) for numbers in seen]
    children: list[int] = []
    for exporter in exporters:
        exporter.start()
    try:
        while len(children) < 20 or any(len(numbers) < 3 for numbers in seen):
            pid = os.fork()
            if pid == 0:
                try:
                    count()
                finally:
                    os.kill(os.getpid(), signal.SIGKILL)
            children.append(pid)
            os.waitpid(pid, 0)
    finally:
        over.set()
        for exporter in exporters:
            exporter.join()
    assert gather([folder]).series[SWAPS] == [200.0 * len(children)]
    for numbers in seen:
        assert numbers == sorted(numbers)

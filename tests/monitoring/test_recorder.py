"""What a process records of a model: all from zero, starts by backend and result, how far a start has got."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest

from tests.support.file_backend import FileBackend
from tests.support.models import archive_source, settings_of
from ts_handlers.errors import WarmStartError
from ts_handlers.execution.contexts import PoolStats
from ts_handlers.key.cache_key import OUTSIDE
from ts_handlers.key.parts import PARTS
from ts_handlers.metrics import COUNTERS, PHASES, Metrics
from ts_handlers.monitoring.catalogue import BY_NAME, BY_REASON, BY_REQUEST, CACHE, MISS_REASONS, metric_of
from ts_handlers.monitoring.gathering import gather
from ts_handlers.monitoring.progress import shown
from ts_handlers.monitoring.recorder import FOLDER, SWITCH, begin_recording, folder_of, recorder_of
from ts_handlers.start import start_model


def recorded(store: Path) -> dict[tuple[str, ...], list[float]]:
    found = gather([folder_of(store)]).series
    return {(name, *labels): numbers for (name, labels), numbers in found.items()}


def test_every_counter_has_a_metric() -> None:
    for counter in COUNTERS:
        where = metric_of(counter)
        if counter in (*BY_REASON, *BY_REQUEST):
            assert where is None
        else:
            assert where is not None, (
                f"{counter} has no metric: add it to COUNTED of ts_handlers/monitoring/catalogue.py"
            )
            assert where[1] in (BY_NAME[where[0]].zeros or ((),)), f"{counter} does not begin at 0"


def test_no_metric_has_the_name_of_one_that_torchserve_serves() -> None:
    old = {f"ts_handlers_{counter}_total" for counter in COUNTERS} | {f"ts_handlers_{phase}_ms" for phase in PHASES}
    old |= {f"ts_handlers_context_{name}" for name in ("waits_total", "wait_ms", "refused_total")}
    assert old & {family.full_name for family in BY_NAME.values()} == set()


def test_every_part_of_the_key_is_a_reason() -> None:
    assert {name for name, _ in PARTS} | {OUTSIDE} <= set(MISS_REASONS)


def test_counters_are_there_from_the_start_at_zero(tmp_path: Path) -> None:
    begin_recording(tmp_path)
    recorder_of("m")
    found = recorded(tmp_path)
    assert all(value == 0 for numbers in found.values() for value in numbers)
    assert {("builds_total", "m", reason) for reason in MISS_REASONS} <= set(found)
    counters = {family.name for family in BY_NAME.values() if family.type == "counter"}
    if not any(counter.startswith(CACHE) for counter in COUNTERS):
        counters -= {"result_cache_events_total"}
    assert counters == {name for name, *_ in found} - {"batch_seconds", "batches_in_progress"}


def test_a_miss_then_a_hit(archive: Path, tmp_path: Path, backend: FileBackend) -> None:
    store = tmp_path / "store"
    begin_recording(store)
    for _ in range(2):
        start_model(archive_source(archive), settings_of(backends=["aot_inductor"], store=str(store)))
    found = recorded(store)
    name = archive_source(archive).name
    starts = {key[2:]: sum(numbers[:-1]) for key, numbers in found.items() if key[0] == "start_seconds"}
    assert starts == {("aot_inductor", "built"): 1, ("aot_inductor", "hit"): 1}
    assert found["builds_total", name, "none"] == [1.0]
    assert (found["lookups_total", name, "hit"], found["lookups_total", name, "miss"]) == ([1.0], [1.0])
    phases = {key[2] for key, numbers in found.items() if key[0] == "start_phase_seconds" and key[4] == "built"}
    assert {"key", "lookup", "wait", "build", "publish", "load", "canary"} <= phases
    info = {key[2:]: numbers for key, numbers in found.items() if key[0] == "artifact_info"}
    assert sorted((backend, result, value) for (backend, _, result), (value,) in info.items()) == [
        ("aot_inductor", "built", 0.0),
        ("aot_inductor", "hit", 1.0),
    ]


def test_a_start_that_fails_is_told_with_the_reason(archive: Path, tmp_path: Path, backend: FileBackend) -> None:
    store = tmp_path / "store"
    begin_recording(store)
    settings = settings_of(backends=["aot_inductor"], store=str(store), on_miss="fail")
    with pytest.raises(WarmStartError):
        start_model(archive_source(archive), settings)
    gathered = gather([folder_of(store)])
    name = archive_source(archive).name
    assert gathered.series["start_failures_total", (name,)] == [1.0]
    (progress,) = gathered.progress[name]
    assert (progress["state"], progress["serving"]) == ("failed", False)
    assert progress["reason"].startswith("MissError: no entry")


def test_the_phases_of_a_start_are_told_with_the_estimate(
    archive: Path, tmp_path: Path, backend: FileBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = tmp_path / "store"
    begin_recording(store)
    seen: list[dict[str, Any]] = []
    recorder = recorder_of(archive_source(archive).name)
    assert recorder is not None
    write = recorder._recording.file.write_progress

    def watched(model: str, facts: dict[str, Any]) -> bool:
        seen.append(shown(json.loads(json.dumps(facts))))
        return write(model, facts)

    monkeypatch.setattr(recorder._recording.file, "write_progress", watched)
    settings = settings_of(backends=["aot_inductor"], store=str(store))
    start_model(archive_source(archive), settings)
    states = [
        state for state, before in zip(seen, [{}, *seen[:-1]], strict=True) if state["state"] != before.get("state")
    ]
    assert [each["state"] for each in states] == ["starting", "waiting", "compiling", "starting", "ready"]
    assert [each["serving"] for each in states] == [False, False, False, False, True]
    assert states[-1]["share"] == 1.0


def test_waits_for_contexts_are_counted_again_after_a_swap(tmp_path: Path) -> None:
    begin_recording(tmp_path)
    recorder = recorder_of("m")
    assert recorder is not None
    for stats in (
        PoolStats(size=2, waited=5, wait_seconds=1.0),
        PoolStats(size=2),
        PoolStats(size=2, waited=1, wait_seconds=0.25),
    ):
        recorder.contexts(stats)
    found = recorded(tmp_path)
    assert (found["context_queue_calls_total", "m"], found["context_queue_seconds_total", "m"]) == ([6.0], [1.25])


def test_nothing_is_recorded_where_it_is_switched_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SWITCH, "off")
    begin_recording(tmp_path)
    assert recorder_of("m") is None
    assert not (tmp_path / FOLDER).exists()


def test_folders_above_a_new_store_are_as_private_as_the_store_makes_them(tmp_path: Path) -> None:
    before = os.umask(0o002)
    try:
        begin_recording(tmp_path / "new" / "store")
    finally:
        os.umask(before)
    made = [tmp_path / "new", tmp_path / "new" / "store", folder_of(tmp_path / "new" / "store")]
    assert [stat.S_IMODE(folder.stat().st_mode) for folder in made] == [0o700] * 3


def test_a_folder_that_cannot_be_made_fails_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ts_handlers.monitoring import recorder

    (tmp_path / FOLDER).write_text("a file")
    monkeypatch.setattr(recorder, "writable_directories", lambda store: iter([store]))
    begin_recording(tmp_path)
    assert recorder_of("m") is None
    Metrics().count("swap")

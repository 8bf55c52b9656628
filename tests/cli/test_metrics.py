"""`metrics`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ts_handlers.monitoring.gathering import gather
from ts_handlers.monitoring.process_file import ProcessFile
from ts_handlers.monitoring.recorder import folder_of


def test_once_prints_what_is_in_the_store_and_what_was_recorded(run: Callable[..., Any], filled: Path) -> None:
    folder = folder_of(filled)
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    before = gather([folder]).series.get(("swaps_total", ("m",)), [0.0])
    file = ProcessFile(folder)
    file.add(("swaps_total", ("m",)), 3.0)
    file.close()
    done = run("metrics", "--store", filled, "--once")
    assert done.code == 0
    assert before == [0.0]
    assert 'ts_handlers_swaps_total{model="m"} 3\n' in done.out
    assert run("metrics", "--store", filled, "--json").json == {"models": {}}
    entries = run("ls", "--store", filled, "--json").json["total"]["entries"]
    assert f"ts_handlers_store_entries {entries}\n" in done.out


def test_a_store_that_does_not_exist_yet_has_no_entries(run: Callable[..., Any], tmp_path: Path) -> None:
    done = run("metrics", "--store", tmp_path / "store", "--once")
    assert (done.code, "ts_handlers_store_entries 0\n" in done.out) == (0, True)
    assert not (tmp_path / "store").exists()

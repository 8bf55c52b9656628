"""READY while a child process builds, and the swap under load; building ahead of the first start."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest

from tests.support.torchserve_archives import ROWS, ArchiveFactory, expected
from tests.support.torchserve_records import ServerFactory, published, starts
from ts_handlers.exporter.collecting import Collector
from ts_handlers.servers.torchserve.prewarm import prewarm
from ts_handlers.testing import TorchServe

CONFIG = Path(__file__).parents[2] / "config.properties"


class Load:
    """Threads that send requests one after the other and leave the niced child some of the processors."""

    def __init__(self, server: TorchServe, model: str, threads: int = 2) -> None:
        self.answers: list[tuple[int, Any]] = []
        self._over = threading.Event()
        self._threads = [threading.Thread(target=self._send, args=(server, model)) for _ in range(threads)]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *details: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()

    def wait_for(self, count: int) -> None:
        """Wait for that many more answers."""
        wanted = len(self.answers) + count
        while len(self.answers) < wanted:
            time.sleep(0.01)

    def _send(self, server: TorchServe, model: str) -> None:
        while not self._over.is_set():
            answer = server.predict(model, ROWS)
            self.answers.append((answer.status, answer.json() if answer.status == 200 else answer.text))
            time.sleep(0.02)


def test_ready_eagerly_then_swapped_under_load(
    archives: ArchiveFactory, tmp_path: Path, make_server: ServerFactory
) -> None:
    background = "on_miss: background\n    background: {compile_threads: 1, nice: 5}\n    backends:"
    archives.tiny("background", replace={"model-config.yaml": ("backends:", background)})
    store = tmp_path / "store"
    with (
        make_server(["background"], store, config=CONFIG) as server,
        Load(server, "background") as load,
    ):
        server.wait_ready("background")
        pids = server.worker_pids("background")
        first = server.describe("background")
        assert (first["backend"], first["result"]) == ("eager", "background")
        assert first["background"]["state"] in ("waiting", "building")
        assert first["progress"]["state"] in ("waiting", "compiling")
        told = Collector(store).progress()["background"]
        assert (told["state"], told["serving"]) == ("compiling", True)
        assert published(store) == []
        load.wait_for(20)
        while (facts := server.describe("background"))["background"]["state"] not in ("swapped", "failed"):
            time.sleep(0.1)
        told = Collector(store).progress()["background"]
        assert (told["state"], told["serving"], told["phase"]) == ("ready", True, None)
        before = len(load.answers)
        load.wait_for(20)
        metrics = server.metrics()
        assert server.worker_pids("background") == pids
        log = server.log()
    assert (facts["backend"], facts["result"]) == ("aot_inductor", "swapped"), facts["background"]
    assert (facts["counters"]["build"], facts["counters"]["background_build"], facts["counters"]["swap"]) == (1, 1, 1)
    assert len(published(store)) == 1
    assert [start["result"] for start in starts(server, "background")] == ["background"]
    series = Collector(store).series()
    ended = {labels[1:]: sum(counts[:-1]) for (name, labels), counts in series.items() if name == "start_seconds"}
    assert ended == {("eager", "background"): 1, ("aot_inductor", "swapped"): 1}
    assert series["builds_total", ("background", "none")] == [1.0]
    right = [pytest.approx(row, abs=1e-6) for row in expected(1, ROWS)]
    assert before > 20
    assert [(status, answer) for status, answer in load.answers if status != 200 or answer != right] == []
    assert "ts_handlers_swap_total{" in metrics
    assert "build of background: ts_handlers build" in log


def test_prewarmed_archive_is_a_hit_on_the_first_start(
    archives: ArchiveFactory, tiny: str, tmp_path: Path, make_server: ServerFactory
) -> None:
    store = tmp_path / "store"
    done = prewarm(archives.model_store / f"{tiny}.mar", store=store)
    assert (done.ok, done.result, done.backend) == (True, "built", "aot_inductor"), done
    with make_server([tiny], store) as server:
        server.wait_ready(tiny)
        facts = server.describe(tiny)
        assert server.predict(tiny, ROWS).json() == [pytest.approx(row, abs=1e-6) for row in expected(1, ROWS)]
    assert (facts["result"], facts["key"]) == ("hit", done.key)
    assert (facts["counters"]["build"], facts["counters"]["hit"]) == (0, 1)
    assert len(published(store)) == 1

"""Several workers of a real TorchServe with one process that holds their model."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.support.torchserve_archives import ROWS, TINY, ArchiveFactory, expected
from tests.support.torchserve_records import ServerFactory, published, starts
from ts_handlers.exporter.collecting import Collector
from ts_handlers.testing import Response, TorchServe

PROPERTIES = Path(__file__).parents[2] / "config.properties"  # with metrics that are not declared
CONFIG = (TINY / "model-config.yaml").read_text("utf-8")
SHARED = "contexts: {count: 2, across_workers: true}\n    backends:"


def shared(workers: int) -> tuple[str, str]:
    """Changes of the tiny model's configuration."""
    return CONFIG, CONFIG.replace("backends:", SHARED).replace("minWorkers: 1", f"minWorkers: {workers}")


CUSTOM = """class Handler(CompiledHandler):
    def load_model(self, model_dir, model_file, weights_path):
        import torch
        from model import Tiny

        module = Tiny()
        module.load_state_dict(torch.load(weights_path, weights_only=True))
        return module
"""
UNREGISTERED_SECONDS = 60


def process_of(server: TorchServe, model: str) -> int:
    return int(server.describe(model)["across_workers"]["pid"])


def rows_of(number: int) -> list[list[float]]:
    """The rows of a request, other ones for each number."""
    return [[number / 10, -1.0, 2.0, 0.0]] * (1 + number % 4)


def ready(server: TorchServe, model: str) -> int:
    """How many workers answer."""
    (entry,) = server.status(model)
    return sum(worker["status"] == "READY" for worker in entry["workers"])


def wait_for(condition: Callable[[], bool], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[0] != b"Z"
    except OSError:
        return False


def counted(server: TorchServe, name: str) -> float:
    """The sum of a counter over all workers, as Prometheus sees it."""
    found = re.findall(rf"^ts_handlers_{name}_total\{{[^}}]*\}} (\S+)$", server.metrics(), re.MULTILINE)
    return sum(map(float, found))


def test_workers_share_a_process_and_lose_no_request_with_it(
    archives: ArchiveFactory, tmp_path: Path, make_server: ServerFactory
) -> None:
    archives.tiny("sharing", replace={"model-config.yaml": shared(3)})
    store = tmp_path / "store"
    with make_server([], store, model_api=True, config=PROPERTIES) as server:
        server.register("sharing.mar", model_name="sharing")
        server.wait_ready("sharing", 3)
        workers = server.worker_pids("sharing")
        assert len(set(workers)) == 3
        first = process_of(server, "sharing")
        assert server.describe("sharing")["across_workers"]["workers"] == sorted(workers)
        assert [start["result"] for start in starts(server, "sharing")] == ["built"]
        assert len(published(store)) == 1

        def ask(number: int) -> Response:
            if number == 150:
                os.kill(first, signal.SIGKILL)
            return server.predict("sharing", rows_of(number))

        with ThreadPoolExecutor(12) as clients:
            answers = list(clients.map(ask, range(500)))
        assert {answer.status for answer in answers} == {200}
        for number, answer in enumerate(answers):
            right = expected(1, rows_of(number))
            assert answer.json() == [pytest.approx(row, abs=1e-5) for row in right], number
        second = process_of(server, "sharing")
        assert second != first
        assert server.worker_pids("sharing") == workers
        assert [start["result"] for start in starts(server, "sharing")] == ["built", "hit"]
        # Each start was reported by one worker.
        assert wait_for(lambda: counted(server, "hit") > 0, 60)
        assert (counted(server, "build"), counted(server, "miss"), counted(server, "hit")) == (1, 1, 1)

        bad = server.predict("sharing", [[1.0, 2.0]])
        assert (bad.status, bad.json()["type"]) == (400, "InputError")

        os.kill(workers[0], signal.SIGKILL)
        assert wait_for(lambda: workers[0] not in server.worker_pids("sharing") and ready(server, "sharing") == 3, 120)
        assert process_of(server, "sharing") == second
        for _ in range(12):
            assert server.predict("sharing", ROWS).json() == [pytest.approx(row, abs=1e-5) for row in expected(1, ROWS)]
        server.unregister("sharing")
        assert wait_for(lambda: not runs(second), UNREGISTERED_SECONDS)
    # The exporter counts each event once, though a worker and the model's process were killed.
    series = Collector(store).series()
    assert series["builds_total", ("sharing", "none")] == [1.0]
    assert [series["lookups_total", ("sharing", result)] for result in ("hit", "miss")] == [[1.0], [1.0]]
    assert series["request_errors_total", ("sharing", "invalid_input")] == [1.0]
    ended = {labels[2]: sum(counts[:-1]) for (name, labels), counts in series.items() if name == "start_seconds"}
    assert ended == {"built": 1, "joined": 3}


def test_handlers_with_a_way_of_their_own_are_shared_too(
    archives: ArchiveFactory, tmp_path: Path, make_server: ServerFactory
) -> None:
    archives.tiny(
        "custom",
        replace={"model-config.yaml": shared(1), "handler.py": ("class Handler(CompiledHandler):\n    pass\n", CUSTOM)},
    )
    with make_server(["custom"], tmp_path / "store") as server:
        server.wait_ready("custom")
        facts = server.describe("custom")
        assert facts["backend"] == "aot_inductor", facts["fallbacks"]
        assert facts["across_workers"]["workers"] == server.worker_pids("custom")
        assert server.predict("custom", ROWS).json() == [pytest.approx(row, abs=1e-5) for row in expected(1, ROWS)]


def test_a_stopped_process_is_replaced_and_no_request_fails(
    archives: ArchiveFactory, tmp_path: Path, make_server: ServerFactory
) -> None:
    config, changed = shared(2)
    changed = changed.replace("across_workers: true", "across_workers: true, silent_seconds: 5, wait_seconds: 300")
    archives.tiny("stopped", replace={"model-config.yaml": (config, changed)})
    with make_server(["stopped"], tmp_path / "store") as server:
        server.wait_ready("stopped", 2)
        workers = server.worker_pids("stopped")
        first = process_of(server, "stopped")

        def ask(number: int) -> Response:
            if number == 20:
                os.kill(first, signal.SIGSTOP)
            return server.predict("stopped", rows_of(number))

        with ThreadPoolExecutor(8) as clients:
            answers = list(clients.map(ask, range(60)))
        assert {answer.status for answer in answers} == {200}
        for number, answer in enumerate(answers):
            assert answer.json() == [pytest.approx(row, abs=1e-5) for row in expected(1, rows_of(number))], number
        assert not runs(first)
        assert process_of(server, "stopped") != first
        assert server.worker_pids("stopped") == workers

"""The result cache on a real TorchServe: its headers reach clients, its counts Prometheus, and no answer is stale."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.support.torchserve_archives import TINY, ArchiveFactory, expected
from tests.support.torchserve_records import ServerFactory
from ts_handlers.testing import Response, TorchServe

PROPERTIES = Path(__file__).parents[2] / "config.properties"  # with metrics that are not declared
CONFIG = (TINY / "model-config.yaml").read_text("utf-8")
RESULTS = "result_cache: {ttl: 1h}\n    backends: [eager]"
CACHED = (
    CONFIG,
    CONFIG.replace("backends: [aot_inductor, inductor, eager]", RESULTS).replace("batchSize: 4", "batchSize: 8"),
)


@pytest.fixture(scope="module")
def server(
    archives: ArchiveFactory, make_server: ServerFactory, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[TorchServe]:
    """Two versions of a model with a result cache, whose weights differ."""
    for seed, version in ((1, "1.0"), (2, "2.0")):
        archives.tiny(
            "kept", seed=seed, version=version, file_name=f"kept-{seed}", replace={"model-config.yaml": CACHED}
        )
    store = tmp_path_factory.mktemp("kept") / "store"
    with make_server([], store, model_api=True, config=PROPERTIES) as running:
        running.register("kept-1.mar", model_name="kept")
        running.wait_ready("kept")
        yield running


def rows_of(number: int) -> list[list[float]]:
    """The rows of a request, other ones for each number."""
    return [[number / 10, -1.0, 2.0, 0.0]] * (1 + number % 3)


def counted(server: TorchServe, name: str) -> float:
    found = re.findall(rf"^ts_handlers_result_cache_{name}_total\{{[^}}]*\}} (\S+)$", server.metrics(), re.MULTILINE)
    return sum(map(float, found))


def is_right(answer: Response, number: int, seed: int) -> bool:
    return answer.status == 200 and answer.json() == [
        pytest.approx(row, abs=1e-5) for row in expected(seed, rows_of(number))
    ]


def test_clients_see_what_was_answered_from_the_cache(server: TorchServe) -> None:
    first, second = (server.predict("kept", rows_of(1000)) for _ in range(2))
    assert [answer.headers["x-cache"] for answer in (first, second)] == ["miss", "hit"]
    assert (first.body, "age" in first.headers, second.headers["age"].isdigit()) == (second.body, False, True)
    assert is_right(second, 1000, 1)
    unstored = server.predict("kept", rows_of(1001), headers={"Cache-Control": "no-store"})
    assert unstored.headers["x-cache"] == "bypass"
    assert server.predict("kept", rows_of(1001)).headers["x-cache"] == "miss"
    refused = [server.predict("kept", [[1.0]]) for _ in range(2)]
    assert [(answer.status, answer.headers["x-cache"]) for answer in refused] == [(400, "miss")] * 2
    shown = server.describe("kept")["result_cache"]
    assert ("reason" in shown, shown["not_stored"]) == (False, {})  # TorchServe leaves null out
    assert shown["entries"] >= 2


def test_no_answer_is_wrong_or_stale_while_the_model_is_updated_under_load(server: TorchServe) -> None:
    """Who asks before the update gets the old weights' answer, who asks after it the new ones', and nobody another."""
    before = {name: counted(server, name) for name in ("hit", "miss", "coalesced")}
    server.register("kept-2.mar", model_name="kept")
    began, updated = threading.Event(), threading.Event()

    def ask(number: int) -> tuple[tuple[int, ...], Response]:
        new = updated.is_set()
        answer = server.predict("kept", rows_of(number % 20))
        old = not began.is_set()
        return ((2,) if new else (1,) if old else (1, 2)), answer

    def update() -> None:
        server.wait_ready("kept", version="2.0")
        began.set()
        server._management("PUT", "/models/kept/2.0/set-default")
        updated.set()

    with ThreadPoolExecutor(8) as clients:
        loaded = [clients.submit(ask, number) for number in range(300)]
        update()
        loaded += [clients.submit(ask, number) for number in range(300, 600)]
        answers = [each.result() for each in loaded]
    wrong = [
        (number, seeds, answer.text)
        for number, (seeds, answer) in enumerate(answers)
        if not any(is_right(answer, number % 20, seed) for seed in seeds)
    ]
    assert wrong == []
    assert {seeds for seeds, _ in answers} >= {(1,), (2,)}
    now = {name: counted(server, name) - before[name] for name in before}
    assert now["hit"] > 300
    assert now["hit"] + now["miss"] + now["coalesced"] <= 600
    assert server.describe("kept", version="2.0")["result_cache"]["entries"] >= 20

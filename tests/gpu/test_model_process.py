"""One process that holds a model on a GPU for several workers. Layer: real GPU, real processes, no TorchServe."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from tests.support.models import TWO_LAYERS, eager_model, write_archive
from tests.support.workers import MODEL, Worker, slow_calls_beside, wait_until

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")]

Start = Callable[..., Worker]
ROWS = [[1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 8.0]]


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    return write_archive(tmp_path / "archive", MODEL)


@pytest.fixture
def start(archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    workers: list[Worker] = []

    def start_worker(**settings: object) -> Worker:
        log = tmp_path / f"worker{len(workers)}.log"
        workers.append(Worker(archive, tmp_path / "store", log, device="cuda:0", **settings))
        return workers[-1]

    yield start_worker
    for worker in workers:
        worker.kill()


def expected(archive: Path, rows: list[list[float]]) -> list[list[float]]:
    with torch.inference_mode():
        return eager_model(archive)(torch.tensor(rows))["y"].tolist()


def test_workers_have_no_cuda_context_of_their_own(start: Start, archive: Path) -> None:
    workers = [start(contexts={"count": 2}) for _ in range(3)]
    assert len({worker.ready() for worker in workers}) == 1
    for number in range(1, 30):
        for worker in workers:
            worker.send(number, [[float(number), 1.0, 2.0, 3.0]] * (1 + number % 5))
    for worker in workers:
        for _ in range(29):
            answer = worker.line()
            rows = [[float(answer["number"]), 1.0, 2.0, 3.0]] * (1 + answer["number"] % 5)
            assert answer["y"] == [pytest.approx(row, rel=1e-3, abs=1e-3) for row in expected(archive, rows)]
        facts = worker.describe()
        assert facts["cuda"] is False
        assert facts["facts"]["device"] == "cuda:0"


def test_a_broken_context_costs_the_request_that_broke_it_and_no_other(start: Start, archive: Path) -> None:
    workers = [start(contexts={"count": 4}) for _ in range(2)]
    first = workers[0].ready()
    workers[1].ready()
    failed, answers = slow_calls_beside(777.0, workers)
    assert [each["number"] for each in failed] == [9], failed
    assert "CUDA" in failed[0]["message"]
    for answer in answers:
        right = expected(archive, [[-0.3, float(answer["number"]), 0.0, 0.0]])
        assert answer["y"] == [pytest.approx(row, rel=1e-3, abs=1e-3) for row in right]
    answer = workers[1].call(ROWS)
    assert answer["y"] == [pytest.approx(row, rel=1e-3, abs=1e-3) for row in expected(archive, ROWS)]
    assert wait_until(lambda: workers[0].describe()["facts"]["across_workers"]["pid"] != first)


def test_recorded_artifacts_are_shared(start: Start, archive: Path) -> None:
    model = TWO_LAYERS.replace("return self", 'return {"rows": 7, "both": (x, None), "y": self')
    write_archive(archive, model.replace("self.first(x)))", "self.first(x)))}"))
    contexts = {"count": 2, "cuda_graphs": True}
    workers = [
        start(backends=["aot_inductor"], strict=True, warmup=[{"batch": 2}], contexts=contexts) for _ in range(2)
    ]
    assert workers[0].ready() == workers[1].ready()
    for worker in workers:
        for rows in (ROWS, ROWS[:1], ROWS * 3):
            answer = worker.call(rows)
            assert answer["y"] == [pytest.approx(row, rel=1e-3, abs=1e-3) for row in expected(archive, rows)]
    facts = workers[0].describe()["facts"]
    assert facts["backend"] == "aot_inductor"
    assert facts["artifact"]["cuda_graphs"] > 0


STATEFUL = """
import torch


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(4, 3)
        self.register_buffer("kept", torch.zeros(64, 4), persistent=False)

    def forward(self, x):
        kept = self.kept
        kept.copy_(x[:1].expand_as(kept))
        torch.cuda._sleep(2_000_000)  # about a millisecond on the device, in which another call must not write
        return {"y": self.layer(kept[:1]), "rows": 1, "both": (kept[-1:] * 1.0, None)}
"""


def test_with_one_context_calls_of_several_workers_follow_one_another(start: Start, archive: Path) -> None:
    """A module that writes into a buffer of its own, as one with a static cache does."""
    write_archive(archive, STATEFUL)
    workers = [start(contexts={"count": 1}) for _ in range(4)]
    assert len({worker.ready() for worker in workers}) == 1
    for number in range(100):
        for index, worker in enumerate(workers):
            worker.send(number, [[number + index / 10, 1.0, 2.0, 3.0]])
    for index, worker in enumerate(workers):
        for _ in range(100):
            answer = worker.line()
            assert answer["echo"] == [pytest.approx([answer["number"] + index / 10, 1.0, 2.0, 3.0], rel=1e-5)]


def test_memory_that_cannot_be_registered_fails_no_later_launch() -> None:
    from ts_handlers.model_process.segments import pin

    memory = torch.zeros(1 << 16, dtype=torch.uint8)
    undo = pin(memory)
    assert memory.is_pinned()
    again = pin(memory)  # is registered already
    assert float((torch.ones(3, device="cuda") * 2).sum()) == 6.0
    again()
    assert memory.is_pinned()
    undo()

"""Workers that share one process for their model, as real processes. Layer: everything but TorchServe."""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.models import LINEAR, archive_source, eager_model, settings_of, write_archive
from tests.support.workers import MODEL, Worker, is_alive, kill, slow_calls_beside, wait_until
from ts_handlers import ModuleSource, start_model
from ts_handlers.errors import ModelError, SettingsError
from ts_handlers.model_process.shared_model import SharedModel

pytestmark = pytest.mark.processes

Start = Callable[..., Worker]
ROWS = [[1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 8.0]]


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The processes' folders lie in a temporary folder of the test's own."""
    path = tmp_path / "tmp"
    path.mkdir()
    monkeypatch.setenv("TMPDIR", str(path))
    monkeypatch.setattr("tempfile.tempdir", None)
    return path


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    return write_archive(tmp_path / "archive", MODEL)


@pytest.fixture
def start(archive: Path, tmp_path: Path) -> Iterator[Start]:
    """Starts workers, which are ended with the test."""
    workers: list[Worker] = []

    def start_worker(**settings: object) -> Worker:
        worker = Worker(archive, tmp_path / "store", tmp_path / f"worker{len(workers)}.log", **settings)
        workers.append(worker)
        return worker

    yield start_worker
    for worker in workers:
        worker.kill()


def expected(archive: Path, rows: list[list[float]]) -> list[list[float]]:
    with torch.inference_mode():
        return eager_model(archive)(torch.tensor(rows))["y"].tolist()


def send_call(connection: Any) -> None:
    """As a worker does."""
    from ts_handlers.model_process.segments import Outbox
    from ts_handlers.model_process.wire import Call

    specs, descriptor = Outbox().write([torch.ones(1, 4)])
    assert descriptor is not None
    connection.send(Call(specs), (descriptor,))
    os.close(descriptor)


def check(answer: dict[str, object], archive: Path, rows: list[list[float]]) -> None:
    assert "error" not in answer, answer
    assert answer["y"] == [pytest.approx(row, abs=1e-6) for row in expected(archive, rows)]
    assert answer["echo"] == [pytest.approx(row) for row in rows]
    assert answer["rows"] == len(rows)


def test_workers_share_one_process_and_each_gets_its_answers(start: Start, archive: Path) -> None:
    workers = [start(contexts={"count": 2}) for _ in range(3)]
    pids = {worker.ready() for worker in workers}
    assert len(pids) == 1
    assert not pids & {worker.pid for worker in workers}
    for number in range(20):
        for index, worker in enumerate(workers):
            worker.send(number, [[number + 1.0, index, 0.0, 1.0]] * (1 + number % 4))
    for index, worker in enumerate(workers):
        answers = {answer["number"]: answer for answer in (worker.line() for _ in range(20))}
        for number, answer in answers.items():
            check(answer, archive, [[number + 1.0, index, 0.0, 1.0]] * (1 + number % 4))
        assert len(answers) == 20
    facts = workers[0].describe()["facts"]
    assert facts["across_workers"]["workers"] == sorted(worker.pid for worker in workers)
    assert facts["contexts"]["size"] == 2
    assert facts["contexts"]["lent"] == 60


def test_what_the_model_refuses_is_refused_as_ever(start: Start, archive: Path) -> None:
    worker = start(contexts={"count": 1, "wait_seconds": 0.2})
    process = worker.ready()
    outside = worker.call([[1.0] * 5])
    assert outside["error"] == "InputError"
    assert "expected size 4 in dimension 1" in outside["message"]
    assert worker.call([[1.0] * 4] * 9)["error"] == "InputError"
    failed = worker.call([[500.0] * 4])
    assert (failed["error"], failed["message"]) == ("ModelProcessError", "RuntimeError: five hundred")
    worker.send(1, [[-1.0] * 4])
    assert wait_until(lambda: worker.describe()["facts"]["contexts"]["in_use"] == 1)
    busy = worker.call(ROWS)
    assert busy["error"] == "BusyError"
    assert "no execution context came free" in busy["message"]
    assert worker.line()["number"] == 1
    check(worker.call(ROWS), archive, ROWS)
    facts = worker.describe()
    assert facts["facts"]["across_workers"]["pid"] == process
    for counters in (facts["facts"]["counters"], facts["counters"]):
        assert (counters["refused"], counters["busy"]) == (2, 1)


def test_no_request_is_lost_with_the_process(start: Start, archive: Path) -> None:
    workers = [start(contexts={"count": 2}) for _ in range(2)]
    before = workers[0].ready()
    assert workers[1].ready() == before
    sent = itertools.count(1)
    for _ in range(3):
        for worker in workers:
            number = next(sent)
            worker.send(number, [[-0.5, float(number), 0.0, 0.0]])
    assert wait_until(lambda: workers[0].describe()["facts"]["contexts"]["in_use"] == 2)
    kill(before)
    for worker in workers:
        for _ in range(3):
            answer = worker.line()
            check(answer, archive, [[-0.5, float(answer["number"]), 0.0, 0.0]])
    for worker in workers:
        assert wait_until(lambda: worker.describe()["facts"]["across_workers"]["joined"] == 2)  # noqa: B023
    assert len({worker.describe()["facts"]["across_workers"]["pid"] for worker in workers} - {before}) == 1


def test_a_request_that_ends_the_process_fails_alone(start: Start, archive: Path) -> None:
    workers = [start(contexts={"count": 4}) for _ in range(2)]
    first = workers[0].ready()
    workers[1].ready()
    failed, answers = slow_calls_beside(666.0, workers)
    assert [(each["number"], each["error"]) for each in failed] == [(9, "ModelProcessError")]
    assert "ended while it answered this request, and again while it answered nothing else" in failed[0]["message"]
    for answer in answers:
        check(answer, archive, [[-0.3, float(answer["number"]), 0.0, 0.0]])
    check(workers[1].call(ROWS), archive, ROWS)
    assert all(worker.describe()["facts"]["across_workers"]["pid"] != first for worker in workers)
    # The first one, the one that the request ended again, and the one that serves. A worker need not have joined each.
    starts = [line for worker in workers for line in worker.logged if line.startswith("ts_handlers start {")]
    assert len(starts) == 3


def test_the_process_outlives_the_worker_that_started_it_and_logs_to_another(start: Start, archive: Path) -> None:
    first = start(backends=["eager"])
    process = first.ready()
    second = start(backends=["eager"])
    assert second.ready() == process
    first.kill()
    assert wait_until(lambda: second.describe()["facts"]["across_workers"]["workers"] == [second.pid])
    check(second.call(ROWS), archive, ROWS)
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
    assert is_alive(process)  # for one that a server starts anew
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
    time.sleep(3)
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
    mark = f'import os, time\nopen({str(marks)!r} + f"/{{os.getpid()}}", "w").close()\ntime.sleep(4)\n'
    (archive / "model.py").write_text(mark + MODEL)
    first = start()
    assert wait_until(lambda: bool(list(marks.iterdir())))
    first.kill()
    second = start()
    process = second.ready()
    assert [path.name for path in marks.iterdir()] == [str(process)]
    check(second.call(ROWS), archive, ROWS)


def test_other_files_are_another_model(start: Start, archive: Path) -> None:
    first = start()
    before = first.ready()
    write_archive(archive, MODEL, seed=5)
    second = start()
    assert second.ready() != before
    check(second.call(ROWS), archive, ROWS)
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


def test_numbers_that_are_equal_but_not_the_same_arrive_as_they_are(start: Start, archive: Path) -> None:
    worker = start()
    worker.ready()
    for first, right in ((1.0, 1), (-0.001, True), (-0.002, 1.0), (1.0, 1), (-0.004, 0), (-0.003, -0.0)):
        found = worker.call([[first, 0.0, 0.0, 0.0]])["rows"]
        assert (type(found), str(found)) == (type(right), str(right))


def test_a_process_that_the_model_forks_keeps_nobody_from_starting_the_next(start: Start, archive: Path) -> None:
    worker = start()
    process = worker.ready()
    check(worker.call([[888.0, 0.0, 0.0, 0.0]]), archive, [[888.0, 0.0, 0.0, 0.0]])
    kill(process)
    check(worker.call(ROWS), archive, ROWS)


def test_a_call_whose_worker_has_ended_is_dropped_and_does_not_count_as_hanging_while_it_waits() -> None:
    import socket
    import threading

    from ts_handlers.model_process.server import Gate, _Calls
    from ts_handlers.model_process.wire import Connection

    called: list[int] = []

    class Model:
        device = torch.device("cpu")

        def __call__(self, x: torch.Tensor) -> None:
            called.append(1)

    gate = Gate(lambda running: None)
    ours, theirs = map(Connection, socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET))
    calls = _Calls(theirs, Model(), gate, None, None)  # type: ignore[arg-type]
    ended: list[Exception] = []

    def run() -> None:
        try:
            calls.run()
        except Exception as error:
            ended.append(error)

    thread = threading.Thread(target=run, daemon=True)
    with gate.alone():
        thread.start()
        send_call(ours)
        ours.close()
        assert not wait_until(lambda: calls.abandoned_for() > 0, 0.3)
    thread.join(10)
    assert [str(error) for error in ended] == ["the worker has ended"]
    assert not called


def test_each_count_is_told_once() -> None:
    import sys
    import threading

    from ts_handlers.model_process.server import Counted

    model = start_model(ModuleSource("linear", torch.nn.Linear(4, 3)), settings_of(backends=["eager"]))
    counted = Counted(model)
    told: list[float] = []

    def work() -> None:
        for _ in range(1000):
            model.metrics.count("outside_eager")
            told.append(counted.take().get("outside_eager", 0))

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        threads = [threading.Thread(target=work) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert sum(told) == model.metrics.counters["outside_eager"] == 8000


def test_a_recipe_that_another_process_would_read_differently_is_refused(archive: Path) -> None:
    import datetime

    source = archive_source(archive)
    for value in (datetime.date(2026, 1, 1), {1: "a"}):
        source._recipe = {**source._recipe, "config": {"value": value}}
        with pytest.raises(SettingsError, match=r"across_workers: 'model' cannot be described.*put it into quotes"):
            start_model(source, settings_of(backends=["eager"], contexts={"across_workers": True}))


def test_a_call_that_hangs_does_not_keep_the_process_when_its_worker_has_ended(
    archive: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The clock of `ABANDONED_SECONDS`, with the parts at hand: a real connection and a call that does not end."""
    import socket
    import threading

    from ts_handlers.model_process.server import _Calls
    from ts_handlers.model_process.wire import Connection

    release = threading.Event()

    class Hangs:
        device = torch.device("cpu")

        def __call__(self, *tensors: torch.Tensor) -> None:
            release.wait(60)

    from ts_handlers.model_process.server import Gate

    ours, theirs = map(Connection, socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET))
    calls = _Calls(theirs, Hangs(), Gate(lambda n: None), None, None)  # type: ignore[arg-type]

    def run() -> None:
        with contextlib.suppress(Exception):  # what comes after the hanging call is not there
            calls.run()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    send_call(ours)
    assert wait_until(lambda: calls._answering)
    assert calls.abandoned_for() == 0.0
    ours.close()
    assert wait_until(lambda: calls.abandoned_for() > 0.05)
    release.set()
    thread.join(10)


def test_what_only_this_process_knows_cannot_be_shared() -> None:
    with pytest.raises(SettingsError, match=r"across_workers: no other process can make 'linear'"):
        start_model(
            ModuleSource("linear", torch.nn.Linear(4, 3)),
            settings_of(backends=["eager"], contexts={"across_workers": True}),
        )


def test_without_declared_inputs_there_is_nothing_to_send(archive: Path) -> None:
    with pytest.raises(ModelError, match=r"needs the model's inputs.*handler\.ts_handlers\.inputs"):
        start_model(archive_source(archive), settings_of({"backends": ["eager"]}, contexts={"across_workers": True}))


def test_requests_outside_the_ranges_are_answered_eagerly_where_that_is_set(archive: Path) -> None:
    settings = settings_of(backends=["eager"], outside="eager", contexts={"across_workers": True})
    model = start_model(archive_source(archive), settings)
    assert isinstance(model, SharedModel)
    rows = torch.ones(20, 4)
    assert torch.allclose(model(rows)["y"], eager_model(archive)(rows)["y"], atol=1e-6)
    assert model.describe()["counters"]["outside_eager"] == 1
    assert model.metrics.counters["outside_eager"] == 1
    model.close()


def test_answers_are_the_callers_own(archive: Path) -> None:
    model = start_model(archive_source(archive), settings_of(backends=["eager"], contexts={"across_workers": True}))
    first = model(torch.ones(2, 4))["y"]
    copy = first.clone()
    model(torch.zeros(2, 4))
    assert torch.equal(first, copy)
    assert model.layer.weight.shape == (3, 4)  # the eager module, built here
    model.close()

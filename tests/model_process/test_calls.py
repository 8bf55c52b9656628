"""Calls of real workers to the process that they share: answers, refusals, calls that end it."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from tests.support.workers import (
    ROWS,
    Start,
    check_answer,
    kill,
    slow_calls_beside,
    wait_until,
)

pytestmark = pytest.mark.processes


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
            check_answer(answer, archive, [[number + 1.0, index, 0.0, 1.0]] * (1 + number % 4))
        assert len(answers) == 20
    facts = workers[0].describe()["facts"]
    assert facts["across_workers"]["workers"] == sorted(worker.pid for worker in workers)
    assert facts["contexts"]["size"] == 2
    assert facts["contexts"]["lent"] == 60


def test_what_the_model_refuses_is_refused_as_ever(start: Start, archive: Path, hold: Path) -> None:
    worker = start(contexts={"count": 1, "wait_seconds": 0.2})
    process = worker.ready()
    outside = worker.call([[1.0] * 5])
    assert outside["error"] == "InputError"
    assert "expected size 4 in dimension 1" in outside["message"]
    assert worker.call([[1.0] * 4] * 9)["error"] == "InputError"
    failed = worker.call([[500.0] * 4])
    assert (failed["error"], failed["message"]) == ("ModelProcessError", "RuntimeError: five hundred")
    worker.send(1, [[-0.01] * 4])
    assert wait_until(lambda: worker.describe()["facts"]["contexts"]["in_use"] == 1)
    busy = worker.call(ROWS)
    assert busy["error"] == "BusyError"
    assert "no execution context came free" in busy["message"]
    hold.unlink()
    assert worker.line()["number"] == 1
    check_answer(worker.call(ROWS), archive, ROWS)
    facts = worker.describe()
    assert facts["facts"]["across_workers"]["pid"] == process
    for counters in (facts["facts"]["counters"], facts["counters"]):
        assert (counters["refused"], counters["busy"]) == (2, 1)


def test_no_request_is_lost_with_the_process(start: Start, archive: Path, hold: Path) -> None:
    workers = [start(contexts={"count": 2}) for _ in range(2)]
    before = workers[0].ready()
    assert workers[1].ready() == before
    sent = itertools.count(1)
    for _ in range(3):
        for worker in workers:
            number = next(sent)
            worker.send(number, [[-0.01, float(number), 0.0, 0.0]])
    assert wait_until(lambda: workers[0].describe()["facts"]["contexts"]["in_use"] == 2)
    kill(before)
    hold.unlink()
    for worker in workers:
        for _ in range(3):
            answer = worker.line()
            check_answer(answer, archive, [[-0.01, float(answer["number"]), 0.0, 0.0]])
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
        check_answer(answer, archive, [[-0.3, float(answer["number"]), 0.0, 0.0]])
    check_answer(workers[1].call(ROWS), archive, ROWS)
    assert all(worker.describe()["facts"]["across_workers"]["pid"] != first for worker in workers)
    # The first one, the one that the request ended again, and the one that serves. A worker need not have joined each.
    starts = [line for worker in workers for line in worker.logged if line.startswith("ts_handlers start {")]
    assert len(starts) == 3


def test_numbers_that_are_equal_but_not_the_same_arrive_as_they_are(start: Start, archive: Path) -> None:
    worker = start()
    worker.ready()
    for first, right in ((1.0, 1), (-0.001, True), (-0.002, 1.0), (1.0, 1), (-0.004, 0), (-0.003, -0.0)):
        found = worker.call([[first, 0.0, 0.0, 0.0]])["rows"]
        assert (type(found), str(found)) == (type(right), str(right))


def test_a_process_that_the_model_forks_keeps_nobody_from_starting_the_next(start: Start, archive: Path) -> None:
    worker = start()
    process = worker.ready()
    check_answer(worker.call([[888.0, 0.0, 0.0, 0.0]]), archive, [[888.0, 0.0, 0.0, 0.0]])
    kill(process)
    check_answer(worker.call(ROWS), archive, ROWS)

"""A process that is silent, or whose call takes too long, is ended, and costs no other call."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from tests.support.workers import (
    ROWS,
    Start,
    Worker,
    check_answer,
    is_alive,
    kill,
    slow_calls_beside,
    wait_until,
)
from ts_handlers.model_process.folder import Folder

pytestmark = pytest.mark.processes
SILENT = {"count": 4, "silent_seconds": 4, "wait_seconds": 300}


def folder(temporary: Path) -> Folder:
    """The one model process's folder."""
    (found,) = temporary.glob("ts_handlers-*/*/")
    return Folder(found)


def serving(temporary: Path) -> int:
    """The number of the process that serves, 0 while there is none."""
    status, sign = folder(temporary).read_status(), folder(temporary).sign()
    there = status is not None and sign is not None and status.phase == "serving" and status.pid == sign[0].pid
    return sign[0].pid if there and sign is not None and is_alive(sign[0].pid) else 0


def calls_run(worker: Worker, count: int) -> bool:
    return bool(worker.describe()["facts"]["contexts"]["in_use"] == count)


def test_a_stopped_process_is_ended_and_costs_no_call(start: Start, archive: Path, hold: Path) -> None:
    workers = [start(contexts=SILENT) for _ in range(2)]
    before = workers[0].ready()
    workers[1].ready()
    for number in (1, 2):
        for worker in workers:
            worker.send(number, [[-0.01, float(number), 0.0, 0.0]])
    assert wait_until(lambda: calls_run(workers[0], 4))
    os.kill(before, signal.SIGSTOP)
    hold.unlink()
    workers[0].send(3, [[-0.01, 3.0, 0.0, 0.0]])  # one that comes while it is stopped
    third = start(contexts=SILENT)  # which would greet it
    for worker, count in ((workers[0], 3), (workers[1], 2)):
        for _ in range(count):
            answer = worker.line()
            check_answer(answer, archive, [[-0.01, float(answer["number"]), 0.0, 0.0]])
    assert third.ready() != before
    assert not is_alive(before)


def test_a_start_that_somebody_stops_is_ended(start: Start, archive: Path, temporary: Path) -> None:
    first = start(contexts=SILENT)
    assert wait_until(lambda: bool(list(temporary.glob("ts_handlers-*/*/lock"))))
    assert wait_until(lambda: folder(temporary).sign() is not None)
    sign = folder(temporary).sign()
    assert sign is not None
    os.kill(sign[0].pid, signal.SIGSTOP)
    assert first.ready() != sign[0].pid
    check_answer(first.call(ROWS), archive, ROWS)


def test_a_call_is_not_blamed_for_a_process_that_somebody_stops_twice(
    start: Start, archive: Path, temporary: Path, hold: Path
) -> None:
    worker = start(contexts=SILENT)
    worker.ready()
    worker.send(1, [[-0.01, 1.0, 0.0, 0.0]])
    for _ in range(2):
        assert wait_until(lambda: serving(temporary) > 0)
        process = serving(temporary)
        assert wait_until(lambda: calls_run(worker, 1))
        os.kill(process, signal.SIGSTOP)
        assert wait_until(lambda: not is_alive(process))  # noqa: B023
    hold.unlink()
    check_answer(worker.line(), archive, [[-0.01, 1.0, 0.0, 0.0]])


def test_a_call_that_keeps_the_interpreters_lock_fails_alone(start: Start, archive: Path) -> None:
    workers = [start(contexts=SILENT) for _ in range(2)]
    first = workers[0].ready()
    workers[1].ready()
    failed, answers = slow_calls_beside(444.0, workers)
    assert [(each["number"], each["error"]) for each in failed] == [(9, "ModelProcessError")]
    assert "kept the interpreter's lock and gave no sign of life" in failed[0]["message"]
    for answer in answers:
        check_answer(answer, archive, [[-0.3, float(answer["number"]), 0.0, 0.0]])
    check_answer(workers[1].call(ROWS), archive, ROWS)
    assert not is_alive(first)


def test_a_call_that_takes_too_long_is_told_so_and_fails_alone(start: Start, archive: Path) -> None:
    contexts = {"count": 4, "call_seconds": 4, "wait_seconds": 300}
    workers = [start(contexts=contexts) for _ in range(2)]
    first = workers[0].ready()
    workers[1].ready()
    failed, answers = slow_calls_beside(333.0, workers)
    assert [(each["number"], each["error"]) for each in failed] == [(9, "ModelProcessError")]
    assert "longer than contexts.call_seconds, 4 s" in failed[0]["message"]
    for answer in answers:
        check_answer(answer, archive, [[-0.3, float(answer["number"]), 0.0, 0.0]])
    check_answer(workers[1].call(ROWS), archive, ROWS)
    assert not is_alive(first)


ROUNDS = 12
"""Kills of the storm; the soak (tests/soak/process.py) has thousands."""


def test_a_storm_of_kills_blames_and_loses_no_call(start: Start, archive: Path, temporary: Path) -> None:
    """Kills from outside, most of them while a retried call runs alone."""
    workers = [start(contexts={"count": 4, "wait_seconds": 600}) for _ in range(2)]
    for worker in workers:
        worker.ready()
    sent = 0
    for round_ in range(ROUNDS):
        for worker in workers:
            sent += 1
            worker.send(sent, [[-0.4, float(sent), 0.0, 0.0]])
        assert wait_until(lambda: serving(temporary) > 0, 300)
        time.sleep(0.05 * (round_ % 8))
        kill(serving(temporary) or folder(temporary).sign()[0].pid)  # type: ignore[index]
    numbers = []
    for worker in workers:
        for _ in range(ROUNDS):
            answer = worker.line()
            check_answer(answer, archive, [[-0.4, float(answer["number"]), 0.0, 0.0]])
            numbers.append(answer["number"])
    assert sorted(numbers) == list(range(1, sent + 1))

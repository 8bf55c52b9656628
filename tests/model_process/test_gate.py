"""The gate of the model's process: ordinary calls run beside each other, retried calls alone."""

from __future__ import annotations

import random
import threading
import time

from tests.support.workers import wait_until
from ts_handlers.model_process.gate import Gate


def in_thread(function: object, *arguments: object) -> threading.Thread:
    thread = threading.Thread(target=function, args=arguments, daemon=True)  # type: ignore[arg-type]
    thread.start()
    return thread


def test_ordinary_calls_run_beside_each_other() -> None:
    counts: list[int] = []
    gate = Gate(counts.append)
    all_inside = threading.Barrier(3)

    def call() -> None:
        with gate.beside_others():
            all_inside.wait(60)

    threads = [in_thread(call) for _ in range(3)]
    for thread in threads:
        thread.join(60)
    assert not all_inside.broken
    assert counts == [1, 2, 3, 2, 1, 0]


def test_a_retried_call_waits_for_those_that_run_and_those_that_come_wait_for_it() -> None:
    gate = Gate(lambda running: None)
    order: list[str] = []
    may_end, retried_inside, retried_may_end = threading.Event(), threading.Event(), threading.Event()

    def first() -> None:
        with gate.beside_others():
            order.append("first begins")
            assert may_end.wait(60)
            order.append("first ends")

    def retried() -> None:
        with gate.alone():
            order.append("retried begins")
            retried_inside.set()
            assert retried_may_end.wait(60)
            order.append("retried ends")

    def last() -> None:
        with gate.beside_others():
            order.append("last")

    threads = [in_thread(first)]
    assert wait_until(lambda: order == ["first begins"])
    threads.append(in_thread(retried))
    assert wait_until(lambda: gate._retried == 1)
    threads.append(in_thread(last))
    assert not retried_inside.is_set()
    may_end.set()
    assert retried_inside.wait(60)
    retried_may_end.set()
    for thread in threads:
        thread.join(60)
    assert order == ["first begins", "first ends", "retried begins", "retried ends", "last"]


def test_no_call_runs_beside_a_retried_one_and_all_end() -> None:
    counts: list[int] = []
    gate = Gate(counts.append)
    lock = threading.Lock()
    running: list[str] = []
    seen: list[tuple[str, ...]] = []

    def call(kind: str, seed: int) -> None:
        generator = random.Random(seed)
        for _ in range(40):
            with gate.alone() if kind == "retried" else gate.beside_others():
                with lock:
                    running.append(kind)
                    seen.append(tuple(running))
                time.sleep(generator.random() / 2000)
                with lock:
                    running.remove(kind)

    threads = [in_thread(call, "ordinary", seed) for seed in range(4)]
    threads += [in_thread(call, "retried", seed) for seed in range(2)]
    for thread in threads:
        thread.join(600)
    assert len(seen) == 6 * 40
    assert all(others == ("retried",) for others in seen if "retried" in others)
    assert counts[-1] == 0


def test_a_call_that_fails_leaves_the_gate_open() -> None:
    gate = Gate(lambda running: None)
    for way in (gate.alone, gate.beside_others):
        try:
            with way():
                raise RuntimeError
        except RuntimeError:
            pass
    with gate.alone():
        pass

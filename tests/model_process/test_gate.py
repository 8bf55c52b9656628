"""Suspect calls run alone."""

from __future__ import annotations

import random
import threading
import time

from ts_handlers.model_process.server import Gate


def test_no_call_runs_beside_a_suspect_one_and_all_end() -> None:
    counts: list[int] = []
    gate = Gate(counts.append)
    lock = threading.Lock()
    running: list[str] = []
    seen: list[tuple[str, ...]] = []
    most = 0

    def call(kind: str, seed: int) -> None:
        nonlocal most
        generator = random.Random(seed)
        for _ in range(40):
            with gate.alone() if kind == "suspect" else gate.beside_others():
                with lock:
                    running.append(kind)
                    seen.append(tuple(running))
                    most = max(most, len(running))
                time.sleep(generator.random() / 2000)
                with lock:
                    running.remove(kind)

    threads = [threading.Thread(target=call, args=("plain", seed)) for seed in range(4)]
    threads += [threading.Thread(target=call, args=("suspect", seed)) for seed in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(seen) == 6 * 40
    assert all(others == ("suspect",) for others in seen if "suspect" in others)
    assert counts[-1] == 0
    assert most <= max(counts) <= len(threads)


def test_plain_calls_run_beside_each_other() -> None:
    counts: list[int] = []
    gate, meeting = Gate(counts.append), threading.Barrier(3, timeout=60)

    def call() -> None:
        with gate.beside_others():
            meeting.wait()

    threads = [threading.Thread(target=call) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not meeting.broken
    assert max(counts) == 3


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

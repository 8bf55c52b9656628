"""Facts of processes, from /proc."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from tests.support.workers import wait_until
from ts_handlers.system import processes
from ts_handlers.system.processes import boot_id, end_process, is_stopped, parent_of, process_age_ms, process_start


def test_this_process_and_one_that_does_not_exist() -> None:
    assert parent_of(os.getpid()) == os.getppid()
    assert process_start(os.getpid()) >= process_start(os.getppid()) > 0
    assert process_start(2**30) == 0
    assert boot_id() == boot_id() != ""
    age = process_age_ms()
    assert age is not None
    assert 0 < age < 86_400_000


@pytest.mark.processes
def test_a_process_is_ended_only_if_it_is_the_one_that_was_meant() -> None:
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        start = process_start(process.pid)
        assert not is_stopped(process.pid)
        os.kill(process.pid, signal.SIGSTOP)
        assert wait_until(lambda: is_stopped(process.pid))
        assert not end_process(process.pid, start + 1)
        assert is_stopped(process.pid)
        assert end_process(process.pid, start)
        assert process.wait(60) == -signal.SIGKILL
        assert not end_process(process.pid, start)
        assert not is_stopped(process.pid)
    finally:
        process.kill()
        process.wait()
        assert process.stdin is not None
        process.stdin.close()


def test_the_age_is_that_of_the_process_that_has_asked_for_this_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "_asked_for_at", 0)
    own = process_age_ms()
    processes.count_age_from(1)
    first = process_age_ms()
    assert own is not None
    assert first is not None
    assert first > own  # the first process of all started before this one
    processes.count_age_from(2**30)  # one that has ended: the age is this process's own again
    again = process_age_ms()
    assert again is not None
    assert own <= again < first

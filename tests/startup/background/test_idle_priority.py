"""The scheduling policy of the thread that runs a function, of those that it starts, and of its caller."""

from __future__ import annotations

import mmap
import os
import threading
from pathlib import Path

import pytest

from ts_handlers.startup.background.idle_priority import keeps_threads, run_at_idle_priority

pytestmark = pytest.mark.skipif(not hasattr(os, "SCHED_IDLE"), reason="SCHED_IDLE is a policy of Linux")


def test_thread_and_those_it_starts_are_idle_and_the_caller_is_not() -> None:
    before = os.sched_getscheduler(0)

    def policies() -> list[int]:
        found = [os.sched_getscheduler(0)]
        child = threading.Thread(target=lambda: found.append(os.sched_getscheduler(0)))
        child.start()
        child.join()
        return found

    assert run_at_idle_priority(policies) == [os.SCHED_IDLE, os.SCHED_IDLE]
    assert os.sched_getscheduler(0) == before


def test_what_it_raises_reaches_the_caller() -> None:
    with pytest.raises(ZeroDivisionError):
        run_at_idle_priority(divmod, 1, 0)


@pytest.mark.parametrize("name", ["libiomp5.so", "libomp.so.5"])
def test_openmp_runtimes_that_hand_threads_on_are_recognised(tmp_path: Path, name: str) -> None:
    assert not keeps_threads()  # torch's own libgomp
    path = tmp_path / name
    path.write_bytes(b"x")
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ):
        assert keeps_threads()
    assert not keeps_threads()

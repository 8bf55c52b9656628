"""Run native code at idle priority: only on processors that no other thread wants (Linux's SCHED_IDLE)."""

from __future__ import annotations

import concurrent.futures
import contextlib
import os
import threading
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")


def run_at_idle_priority(function: Callable[..., T], *args: Any) -> T:
    """Call `function` on a thread of its own with the scheduling policy SCHED_IDLE of Linux, and wait for it.

    The threads that it starts inherit the policy, its OpenMP team first of all. Only for functions that leave the GIL
    alone nearly all the time: a holder that the kernel does not run would keep everybody waiting. A thread of its own
    because an unprivileged one cannot leave the policy again, see sched(7). Elsewhere it is an ordinary call.

    Examples
    --------
    >>> run_at_idle_priority(max, 3, 4)
    4
    """
    if not hasattr(os, "SCHED_IDLE"):
        return function(*args)
    future: concurrent.futures.Future[T] = concurrent.futures.Future()

    def run() -> None:
        with contextlib.suppress(OSError):  # a sandbox may refuse it
            os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
        try:
            future.set_result(function(*args))
        except BaseException as error:
            future.set_exception(error)

    try:
        threading.Thread(target=run, daemon=True, name="ts_handlers-idle").start()
    except RuntimeError:  # no thread to be had
        return function(*args)
    return future.result()


def keeps_threads() -> bool:
    """Whether this process has an OpenMP runtime that hands the threads of one caller to the next one.

    Intel's and LLVM's do; threads that once had SCHED_IDLE would then serve requests. libgomp, which torch brings, ends
    them with their caller.
    """
    try:
        with open("/proc/self/maps", encoding="utf-8", errors="replace") as maps:
            return any("/libiomp" in line or "/libomp" in line for line in maps)
    except OSError:
        return True

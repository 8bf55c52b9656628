"""Idle windows: moments between two requests, for work that would delay one by holding the interpreter or processors.

See docs/decisions/0016-background-builds.md.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from ts_handlers.execution.base import Run
from ts_handlers.startup.background.idle_priority import keeps_threads, run_at_idle_priority
from ts_handlers.system.processors import idle_processors

QUIET_SECONDS = 0.003
"""How long nothing must have been under way: a server still sends the answer when the model has returned."""
PATIENCE_SECONDS = 2.0
"""How long to look for such a moment; a server that never pauses has none."""
IDLE_SECONDS = 30.0
"""How long the checks of an artifact beside a model that serves may keep to idle processors."""
_POLL_SECONDS = 0.001


def wait_for_idle_window(calls: Callable[[], tuple[bool, int]], give_up: Callable[[], bool]) -> bool:
    """Return when no call has been under way for a moment, or after `PATIENCE_SECONDS`.

    Looking costs the calls nothing, which is why nobody is notified.

    Parameters
    ----------
    calls:
        Whether a call is under way or waits, and how many calls there have been.
    give_up:
        Ends the wait.

    Returns
    -------
    Whether such a moment was found.
    """
    deadline = time.monotonic() + PATIENCE_SECONDS
    count, since = -1, 0.0
    while not give_up():
        now = time.monotonic()
        busy, calls_so_far = calls()
        if busy or calls_so_far != count:
            count, since = (-1 if busy else calls_so_far), now
        elif now - since >= QUIET_SECONDS:
            return True
        if now >= deadline:
            return False
        time.sleep(_POLL_SECONDS)
    return False


def in_idle_windows(before_run: Callable[[], None], frees_interpreter: bool) -> Callable[[Run], Run]:
    """Wraps runs of an artifact that is checked while another model serves.

    Each run begins when `before_run` returns, and if possible on processors that requests do not use, with as many
    threads as a request has: the calls that are under way when a run begins are over soon. Where no processor is idle,
    or after `IDLE_SECONDS`, a run is an ordinary one.

    Parameters
    ----------
    before_run:
        Returns when a run may begin.
    frees_interpreter:
        Whether the runs are native code that leaves the GIL alone.
    """
    deadline = time.monotonic() + IDLE_SECONDS
    may_idle = frees_interpreter and not keeps_threads()

    def around(run: Run) -> Run:
        def run_in_idle_window(tensors: list[torch.Tensor]) -> Any:
            before_run()
            if may_idle and idle_processors() > 0 and time.monotonic() < deadline:
                return run_at_idle_priority(run, tensors)
            return run(tensors)

        return run_in_idle_window

    return around

"""Idle windows: times in which no request is under way, for work that would delay one.

Such work holds the interpreter or the processors. See docs/decisions/0016-background-builds.md.
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
"""How long to look for an idle window; a server that never pauses has none."""
IDLE_SECONDS = 30.0
"""How long the checks of an artifact beside a model that serves may keep to idle processors."""
_POLL_SECONDS = 0.001


def wait_for_idle_window(calls: Callable[[], tuple[bool, int]], give_up: Callable[[], bool]) -> bool:
    """Return when no call has been under way for `QUIET_SECONDS`, or after `PATIENCE_SECONDS`.

    It polls, so that a call pays nothing for being watched.

    Parameters
    ----------
    calls:
        Whether a call is under way or waits, and how many calls there have been.
    give_up:
        Ends the wait.

    Returns
    -------
    Whether an idle window was found.
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


class IdleWindows:
    """Idle windows of a model that serves, for the start that is to take its place.

    Parameters
    ----------
    wait:
        Returns in the next idle window.
    """

    def __init__(self, wait: Callable[[], None]) -> None:
        self.before_run = wait

    def around(self, frees_interpreter: bool) -> Callable[[Run], Run]:
        """Wraps runs of an artifact that is checked while another model serves.

        Each run begins in an idle window, and if possible on processors that requests do not use, with as many threads
        as a request has: the calls that are under way when a run begins are over soon. Where no processor is idle, or
        after `IDLE_SECONDS`, a run is an ordinary one.

        Parameters
        ----------
        frees_interpreter:
            Whether the runs are native code that leaves the GIL alone.
        """
        deadline = time.monotonic() + IDLE_SECONDS
        may_idle = frees_interpreter and not keeps_threads()

        def wrap(run: Run) -> Run:
            def run_in_idle_window(tensors: list[torch.Tensor]) -> Any:
                self.before_run()
                if may_idle and idle_processors() > 0 and time.monotonic() < deadline:
                    return run_at_idle_priority(run, tensors)
                return run(tensors)

            return run_in_idle_window

        return wrap

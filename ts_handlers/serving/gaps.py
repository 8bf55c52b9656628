"""Moments between two requests, for work that would delay one: it holds the interpreter, or the processors.

See docs/decisions/0016-background-builds.md.
"""

from __future__ import annotations

import time
from collections.abc import Callable

QUIET_SECONDS = 0.003
"""How long nothing must have been under way: a server still sends the answer when the model has returned."""
PATIENCE_SECONDS = 2.0
"""How long to look for such a moment; a server that never pauses has none."""
_POLL_SECONDS = 0.001


def wait_for_gap(calls: Callable[[], tuple[bool, int]], give_up: Callable[[], bool]) -> bool:
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

"""A circuit breaker: calls to a service that may be slow or dead are bounded in time, and given up after one failure.

A `Breaker` runs each call in a thread of its own and waits for it no longer than its `TimeBudget` allows.

After a failure the breaker is open: calls fail at once, in every process of the host, until `PAUSE_SECONDS` have
passed; then one call tries again.

The state is a file in the store, ``<root>/remote/<service>.json``: ``{"boot": boot id, "until": s, "reason": text}``,
where `until` is a time of the kernel's monotonic clock, which all processes of a host share and nobody sets.
"""

from __future__ import annotations

import contextlib
import json
import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from ts_handlers.errors import UNDECODABLE, RefusedError, RemoteError, StoreError, one_line
from ts_handlers.store.remote.base import UnusableError
from ts_handlers.store.remote.budget import TimeBudget
from ts_handlers.system.files import write_atomically
from ts_handlers.system.processes import boot_id

logger = logging.getLogger(__name__)

PAUSE_SECONDS = 60.0
"""How long a service that has failed is not asked."""
T = TypeVar("T")


class Breaker:
    """The circuit breaker of one service.

    Parameters
    ----------
    state:
        The state file; its folder is made when it is needed, and no file is kept where it cannot be. None keeps the
        state in this object alone.
    name:
        What the service is called in messages; no secrets.
    budget:
        What the service may still cost a start. Calls within its ``counting()`` share it; each other call may take as
        long as the whole budget.
    clean:
        Removes secrets from the messages of errors.
    """

    def __init__(
        self, state: Path | None, name: str, budget: TimeBudget, clean: Callable[[str], str] = lambda text: text
    ) -> None:
        self._state = state
        self._clean = clean
        self.budget = budget
        self._until = 0.0
        self.name = name
        self.reason: str | None = None
        """Why the service failed last; None when calls are made."""

    @property
    def is_open(self) -> bool:
        """Whether calls fail at once; reads the state file."""
        now = time.monotonic()
        if self._until > now:
            return True
        self.reason = None
        if self._state is None:
            return False
        with contextlib.suppress(OSError, KeyError, TypeError, OverflowError, *UNDECODABLE):
            facts = json.loads(self._state.read_text())
            if facts["boot"] == boot_id() and 0 < facts["until"] - now <= PAUSE_SECONDS:
                self._until, self.reason = float(facts["until"]), str(facts["reason"])
        return self.reason is not None

    def call(self, what: str, function: Callable[[threading.Event], T]) -> T:
        """Run `function` in a thread and return its result.

        Parameters
        ----------
        what:
            What is done, for messages.
        function:
            Gets an event that is set once nobody waits any more.

        Raises
        ------
        RemoteError
            The breaker is open; or it has been opened because the call took too long or raised.
        FileNotFoundError, FileExistsError, RefusedError, StoreError
            The call's own answers, which say nothing against the service.
        """
        if self.is_open:
            raise RemoteError(f"{self.name}: {self.reason}")
        given_up = threading.Event()
        box: dict[str, Any] = {}

        def run() -> None:
            try:
                box["result"] = function(given_up)
            except BaseException as error:
                box["error"] = error

        # A daemon: a thread that hangs in a system call must not keep the process from ending.
        thread = threading.Thread(target=run, name=f"ts_handlers {what}", daemon=True)
        thread.start()
        thread.join(self.budget.call_limit)
        if thread.is_alive():
            given_up.set()
            raise self._trip(f"{what}: no answer within the {self.budget.seconds:g} s of timeout_seconds")
        error = box.get("error")
        if error is None:
            result: T = box["result"]
            return result
        if isinstance(error, (FileNotFoundError, FileExistsError, RefusedError, StoreError)):
            raise error
        kind = "" if isinstance(error, UnusableError) else f"{type(error).__name__}: "
        raise self._trip(f"{what}: {kind}{error}") from error

    def _trip(self, problem: str) -> RemoteError:
        """Open the breaker, for the whole host."""
        self.budget.renew()
        self.reason = one_line(self._clean(problem))
        self._until = time.monotonic() + PAUSE_SECONDS
        logger.warning(
            "%s: %s; this host goes on alone and tries again in %.0f s", self.name, self.reason, PAUSE_SECONDS
        )
        if self._state is not None:
            _write(self._state, {"boot": boot_id(), "until": self._until, "reason": self.reason})
        error = RemoteError(f"{self.name}: {self.reason}")
        error.first = True
        return error


def _write(state: Path, facts: dict[str, Any]) -> None:
    with contextlib.suppress(OSError):
        state.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_atomically(state, json.dumps(facts))

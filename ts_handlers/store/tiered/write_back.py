"""A queue of jobs that a thread does after a start: what was built is sent to the remote store."""

from __future__ import annotations

import atexit
import logging
import queue
import threading
from collections.abc import Callable

logger = logging.getLogger(__name__)


class WriteBack:
    """Does jobs in order, in a thread that exists while there are some.

    When the process ends, what is left gets `seconds`; then it is given up and counted.

    Parameters
    ----------
    seconds:
        What the end of the process waits at most; may be changed until then.
    failed:
        Called with the job's name and the error of each job that raised or was given up.
    """

    def __init__(self, seconds: float, failed: Callable[[str, BaseException], None]) -> None:
        self.seconds = seconds
        self._failed = failed
        self._jobs: queue.SimpleQueue[tuple[str, Callable[[], object]]] = queue.SimpleQueue()
        self._changed = threading.Condition()
        self._waiting: list[str] = []
        self._thread: threading.Thread | None = None
        self._registered = False

    def submit(self, name: str, job: Callable[[], object]) -> None:
        """Do `job` after the jobs before it."""
        with self._changed:
            if not self._registered:
                self._registered = True
                atexit.register(self.close)
            self._waiting.append(name)
            self._jobs.put((name, job))
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="ts_handlers write-back", daemon=True)
                self._thread.start()

    def _run(self) -> None:
        while True:
            with self._changed:
                if self._jobs.empty():
                    self._thread = None
                    return
            name, job = self._jobs.get()
            try:
                job()
            except Exception as error:
                self._failed(name, error)
            with self._changed:
                self._waiting.remove(name)
                self._changed.notify_all()

    def wait(self, seconds: float | None = None) -> bool:
        """Wait until every job is done; False when that took longer than `seconds`."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._waiting, seconds)

    def close(self) -> None:
        """Wait for the jobs as long as the end of a process may; what is left then has failed."""
        thread = self._thread
        if self.wait(self.seconds):
            if thread is not None:
                thread.join()  # a thread that ends together with the interpreter can take the process down
        else:
            for name in list(self._waiting):
                self._failed(name, TimeoutError(f"not done {self.seconds:g} s after the process was asked to end"))

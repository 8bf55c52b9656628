"""The child process that holds a model for the workers of a server; `launch` is the side of the worker that starts it.

Its specification (`ts_handlers.system.child_process`): ``name``, ``folder`` and ``lock`` (the descriptor of the
folder's lock), ``server`` (process id and start of the server whose workers are served), and what
`ts_handlers.model.recipes.restore` takes. Standard input stays open for as long as the worker that started this process
waits for it.
"""

from __future__ import annotations

import functools
import logging
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ts_handlers.errors import bounded
from ts_handlers.system.child_process import read_specification

WATCH_SECONDS = 1.0
HANGS_SECONDS, BUILD_HANGS_SECONDS = 600.0, 14_400.0
"""How long a start may stay in one phase when the worker that asked for it has gone, as TorchServe ends one at its
`startupTimeout`: afterwards it ends, and the next worker starts another. The latter is for a build's phases."""
HANGS_STATUS = 71


def main() -> int:
    """Start the model, say so or why not, and serve it until no worker is left."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C ends the server, and this process follows its workers
    logging.raiseExceptions = False  # the log's reader may end before this process does
    logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(message)s")
    spec = read_specification()
    os.set_inheritable(int(spec["lock"]), False)
    os.register_at_fork(after_in_child=functools.partial(os.close, int(spec["lock"])))  # it is this process's alone
    from ts_handlers.model_process.folder import Failure, Folder, Holder, Status, write_holder
    from ts_handlers.model_process.watch import start_beating
    from ts_handlers.system.processes import process_start

    write_holder(int(spec["lock"]), Holder(os.getpid(), process_start(os.getpid())))
    start_beating(int(spec["lock"]))

    folder = Folder(Path(spec["folder"]))
    server_lives = _server_watch(spec["server"])
    watch = StartWatch(server_lives, _is_wanted)

    def progress(phase: str, estimate: float | None) -> None:
        watch.phase_begins(phase)
        folder.write_status(Status(os.getpid(), phase, estimate))

    threading.Thread(target=watch.run, daemon=True, name="ts_handlers-start").start()
    try:
        model, contexts = _start(spec, progress)
    except Exception as error:
        logging.getLogger(__name__).warning("%s: the model's process fails: %s", spec["name"], error, exc_info=True)
        folder.write_status(Status(os.getpid(), "failed", error=Failure(type(error).__name__, bounded(error, 20_000))))
        return 1
    from ts_handlers.model_process.server import Server

    watch.started.set()
    folder.write_status(Status(os.getpid(), "serving"))
    Server(model, folder, _is_wanted, server_lives, contexts).run()
    return 0


def _start(spec: Mapping[str, Any], progress: Callable[[str, float | None], None]) -> tuple[Any, Any]:
    """The model, and the settings of its contexts."""
    from ts_handlers.model.recipes import restore
    from ts_handlers.model_process.server import refuse_without_inputs
    from ts_handlers.monitoring.recorder import begin_recording
    from ts_handlers.settings import default_store_root
    from ts_handlers.startup.fallback import start_here
    from ts_handlers.system.cycle_collector import exempt_from_collection

    progress("process", None)
    made = restore(spec)
    store = Path(made.settings.store or default_store_root()).expanduser()
    begin_recording(store, counts=False)  # the workers are told what is counted here
    model = start_here(made.source, made.settings, made.device, progress=progress, event="start")
    refuse_without_inputs(model)
    if made.settings.result_cache is not None:
        from ts_handlers.result_cache.attach import attach_to_calls

        attach_to_calls(model, made.settings)
    outcome = model.outcome
    exempt_from_collection(outcome.result == "built" or bool(outcome.fallbacks))
    background = model.background
    if background is not None:

        def after_swap() -> None:
            # A full pass holds the interpreter; a call under way holds the eager module.
            background.wait_for_idle_window()
            exempt_from_collection(background.left_module)

        background.when_done(after_swap)
    return model, made.settings.contexts


def _server_watch(server: tuple[int, int]) -> Callable[[], bool]:
    from ts_handlers.system.processes import process_start

    pid, start = server
    return lambda: process_start(pid) == start


class StartWatch:
    """Ends a start that nobody waits for any more, or that hangs.

    Nobody waits when the worker that asked for it and its server are gone. While that worker lives, its own time limit
    is the start's; other workers wait for as long as the start goes on, which holds the lock.

    Parameters
    ----------
    server_lives, wanted:
        Whether the server lives, and the worker that asked for this start.

    Attributes
    ----------
    started:
        Set when the start is over.
    """

    def __init__(self, server_lives: Callable[[], bool], wanted: Callable[[], bool]) -> None:
        self.started = threading.Event()
        self._server_lives, self._wanted = server_lives, wanted
        self._phase, self._since = "process", time.monotonic()

    def phase_begins(self, phase: str) -> None:
        """Call it when the start gets on."""
        self._phase, self._since = phase, time.monotonic()

    def run(self) -> None:
        """Watch until the start is over."""
        while not self.started.wait(WATCH_SECONDS):
            if self._wanted():
                continue
            if not self._server_lives():
                os.kill(os.getpid(), signal.SIGTERM)  # by which the crash guard knows that nothing was wrong
            limit = BUILD_HANGS_SECONDS if self._phase.startswith(("build", "wait", "fetch")) else HANGS_SECONDS
            if time.monotonic() - self._since > limit:
                logging.getLogger(__name__).error(
                    "the start of the model's process has been at %r for more than %g s, and the worker that asked for "
                    "it is gone; it ends, so that another worker can start it",
                    self._phase,
                    limit,
                )
                os._exit(HANGS_STATUS)


def _is_wanted() -> bool:
    """Whether the worker that started this process still waits: its end of standard input is open."""
    readable, _, _ = select.select([0], [], [], 0)
    return not readable


if __name__ == "__main__":
    sys.exit(main())

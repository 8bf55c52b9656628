"""The process that holds a model for the workers of a server: ``python -m ts_handlers.model_process``.

The first line of standard input holds one JSON object: ``name``, ``folder`` and ``lock`` (the descriptor of the
folder's lock), ``server`` (process id and start of the server whose workers are served), and what
`ts_handlers.recipes.restore` takes. Standard input stays open for as long as the worker that started this process waits
for it.
"""

from __future__ import annotations

import json
import logging
import os
import select
import signal
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

WATCH_SECONDS = 1.0


def main() -> int:
    """Start the model, say so or why not, and serve it until no worker is left."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C ends the server, and this process follows its workers
    logging.raiseExceptions = False  # the log's reader may end before this process does
    logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(message)s")
    spec = json.loads(sys.stdin.buffer.readline())
    os.set_inheritable(int(spec["lock"]), False)
    from ts_handlers.model_process.folder import Failure, Folder, Status

    folder = Folder(Path(spec["folder"]))
    serving = threading.Event()
    server_lives = _server_watch(spec["server"])
    threading.Thread(target=_watch, args=(serving, server_lives), daemon=True, name="ts_handlers-server").start()
    try:
        model = _start(spec, lambda phase, left: folder.write_status(Status(os.getpid(), phase, left)))
    except Exception as error:
        logging.getLogger(__name__).warning("%s: the model's process fails: %s", spec["name"], error, exc_info=True)
        folder.write_status(Status(os.getpid(), "failed", error=Failure(type(error).__name__, str(error))))
        return 1
    from ts_handlers.model_process.server import Server

    serving.set()
    folder.write_status(Status(os.getpid(), "serving"))
    Server(model, folder, _is_wanted, server_lives).run()
    return 0


def _start(spec: Mapping[str, Any], progress: Callable[[str, float | None], None]) -> Any:
    from ts_handlers.cycle_collector import exempt_from_collection
    from ts_handlers.model_process.server import refuse_without_inputs
    from ts_handlers.recipes import restore
    from ts_handlers.startup import start_model

    progress("process", None)
    made = restore(spec)
    model = start_model(made.source, made.settings, made.device, progress=progress, event="start")
    refuse_without_inputs(model)
    outcome = model.outcome
    exempt_from_collection(outcome.result == "built" or bool(outcome.fallbacks))
    background = model.background
    if background is not None:

        def after_swap() -> None:
            background.wait_for_gap()  # a full pass holds the interpreter; a call under way holds the eager module
            exempt_from_collection(background.left_module)

        background.when_done(after_swap)
    return model


def _server_watch(server: tuple[int, int]) -> Callable[[], bool]:
    from ts_handlers.model_process.launch import process_start

    pid, start = server
    return lambda: process_start(pid) == start


def _watch(serving: threading.Event, server_lives: Callable[[], bool]) -> None:
    """End a start that nobody waits for any more: the worker that asked for it and its server are gone."""
    while not serving.wait(WATCH_SECONDS):
        if not server_lives() and not _is_wanted():
            os.kill(os.getpid(), signal.SIGTERM)  # by which the crash guard knows that nothing was wrong


def _is_wanted() -> bool:
    """Whether the worker that started this process still waits: its end of standard input is open."""
    readable, _, _ = select.select([0], [], [], 0)
    return not readable


if __name__ == "__main__":
    sys.exit(main())

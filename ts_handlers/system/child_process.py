"""Child processes that run a module of this package: how one is started, how it ended, and how it ends with its parent.

A child gets a specification, one line of JSON on its standard input. It imports the same modules as its parent: it has
the parent's search path, and works in ``/`` until it goes to another folder by itself, so that nothing in the parent's
working directory takes a module's place.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import subprocess

WATCH_SECONDS = 0.2
TERM_SECONDS = 2.0
"""How long a process group may take to end after SIGTERM, before SIGKILL."""


def run_module(name: str) -> list[str]:
    """The command that runs `main` of a module in another Python.

    It looks for modules where ``PYTHONPATH`` says, and nowhere before.
    ``-m`` and ``-c`` look in the working directory first, where files may lie that have a module's name; ``-P``, which
    leaves that out, came with Python 3.11.

    Examples
    --------
    >>> import subprocess
    >>> subprocess.run(run_module("this_module_is_nowhere"), capture_output=True, cwd="/").returncode
    1
    """
    code = f"import sys; sys.path[0] or sys.path.pop(0); from {name} import main; sys.exit(main())"
    return [sys.executable, "-c", code]


def start_child(
    module: str,
    spec: Mapping[str, Any],
    *,
    search: Iterable[str] = (),
    variables: Mapping[str, str] | None = None,
    close_input: bool = True,
    **options: Any,
) -> subprocess.Popen[bytes]:
    """Start a child process, and write its specification to its standard input.

    Parameters
    ----------
    module:
        Its `main` returns the exit status, and calls `read_specification`.
    spec:
        JSON-compatible.
    search:
        Folders to look for modules in before this process's own.
    variables:
        Environment variables to set, beside this process's own.
    close_input:
        Whether to close its standard input behind the specification.
    options:
        Of `subprocess.Popen`.

    Raises
    ------
    OSError
        It cannot be started. One that dies before it has read its specification raises nothing here.
    """
    import subprocess  # which a child does not need, and its memory may be bounded

    process = subprocess.Popen(
        run_module(module),
        stdin=subprocess.PIPE,
        cwd="/",
        env={**os.environ, "PYTHONPATH": _search_path(search), **(variables or {})},
        **options,
    )
    assert process.stdin is not None
    with contextlib.suppress(OSError):
        process.stdin.write(json.dumps(spec).encode() + b"\n")
        process.stdin.flush()
    if close_input:
        with contextlib.suppress(OSError):
            process.stdin.close()
    return process


def _search_path(first: Iterable[str]) -> str:
    # Entries that name no folder stand for the current one.
    return os.pathsep.join(dict.fromkeys(os.path.abspath(entry) for entry in (*first, *sys.path)))


def how_it_ended(code: int) -> str:
    """What a process's return code says, as the predicate of a sentence.

    Parameters
    ----------
    code:
        As of `subprocess.Popen.returncode`: an exit status, or a signal's number below zero.

    Examples
    --------
    >>> how_it_ended(3), how_it_ended(-9), how_it_ended(-99)
    ('ended with status 3', 'was killed by SIGKILL', 'was killed by signal 99')
    """
    if code >= 0:
        return f"ended with status {code}"
    try:
        return f"was killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"was killed by signal {-code}"


def read_specification() -> dict[str, Any]:
    """In a child: what `start_child` was given as `spec`."""
    return dict(json.loads(sys.stdin.buffer.readline()))


def end_with_parent(parent: int) -> None:
    """In a child: lead a process group of its own, and end it when the parent has died, however it died.

    A group, not a session: where the kernel groups processes by session to schedule them, niceness would have no
    effect against the parent's.

    Parameters
    ----------
    parent:
        The parent's process id, as the parent knows it: it may have died already.
    """
    os.setpgid(0, 0)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(WATCH_SECONDS)
        # By SIGTERM the crash guard knows that nothing was wrong with what this process did.
        os.killpg(0, signal.SIGTERM)
        time.sleep(TERM_SECONDS)
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=watch, daemon=True, name="ts_handlers-parent").start()

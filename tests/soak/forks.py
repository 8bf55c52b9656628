"""Trials in forked processes: cheap, because everything is imported before, and a native crash ends the trial alone."""

from __future__ import annotations

import faulthandler
import json
import os
import select
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any


def fork(function: Callable[[], object], stderr: Path | None = None) -> tuple[int, int]:
    """Run `function` in a child; returns its process id and the descriptor from which its result can be read."""
    read, write = os.pipe()
    child = os.fork()
    if child:
        os.close(write)
        return child, read
    code = 1
    try:
        os.close(read)
        if stderr is not None:
            descriptor = os.open(stderr, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(descriptor, 2)
            faulthandler.enable(file=2)
        payload = json.dumps(function()).encode()
        while payload:
            payload = payload[os.write(write, payload) :]
        code = 0
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(code)  # whatever happens, a child never returns into its parent's code


def call(function: Callable[[], object], seconds: float = 120.0) -> tuple[int, Any, str]:
    """Run `function` in a child and wait for it.

    Returns
    -------
    The exit code (negative: the signal), what the function returned, and what the child wrote to stderr. A child that
    takes longer than `seconds` is killed; its text then says so.
    """
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        errors = Path(folder, "stderr")
        errors.touch()
        child, read = fork(function, errors)
        payload, deadline = b"", time.monotonic() + seconds
        with open(read, "rb", buffering=0) as pipe:
            while True:
                ready, _, _ = select.select([pipe], [], [], max(0.0, deadline - time.monotonic()))
                chunk = pipe.read(1 << 16) if ready else None
                if not chunk:
                    break
                payload += chunk
        late = not ready
        if late:
            os.kill(child, signal.SIGKILL)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        text = errors.read_text(errors="replace")
        if late:
            return code, None, f"no result after {seconds:g} s\n{text}"
        return code, json.loads(payload) if code == 0 else None, text

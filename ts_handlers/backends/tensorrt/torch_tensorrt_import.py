"""Importing torch_tensorrt without letting it take the worker along.

A broken installation does not raise ImportError: seen were a bare Exception (no libnvinfer), AssertionError (torch
without CUDA), OSError (its C++ library) and KeyError (a user id without a name), and native code can end the process.
So the import is tried in a child process first, and every exception becomes a `BuildError` with the reason.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
import signal
import subprocess
import sys
import tempfile
from types import ModuleType

from ts_handlers.backends.tensorrt.library import ready_for_torch_tensorrt
from ts_handlers.errors import BuildError, one_line
from ts_handlers.system.patching import hide_module

NAME = "torch_tensorrt"
PROBE_SECONDS = 300
_MARK = "torch_tensorrt was imported"


def import_torch_tensorrt() -> ModuleType:
    """The module, or the reason why there is none.

    Call it after ``torch.cuda.set_device``: importing it initialises CUDA on the current device. After a failure
    ``sys.modules["torch_tensorrt"]`` is None, so that every later import, TorchServe's own included, is an ordinary
    ModuleNotFoundError; a further call here gives the same reason again. Its side effects are undone:
    ``logging.captureWarnings``, and the module ``tensorrt`` when that had been imported before.

    Raises
    ------
    BuildError
        It is not installed or does not work, with the reason.
    """
    reason = _import()
    if reason is not None:
        raise BuildError(reason)
    return sys.modules[NAME]


@functools.cache
def _import() -> str | None:
    """Import it once in this process; returns why that failed, or None."""
    loaded = sys.modules.get(NAME)
    if loaded is not None:
        return None
    sys.modules.pop(NAME, None)  # a None left by somebody else's guard
    reason = _missing() or probe()
    if reason is None:
        reason = _import_here()
    if reason is not None:
        hide_module(NAME)
    return reason


def _missing() -> str | None:
    try:
        found = importlib.util.find_spec(NAME)
    except Exception as error:
        return f"{NAME} cannot be found: {_summary(error)}"
    return None if found is not None else f"{NAME} is not installed; install torch-tensorrt or torch-tensorrt-rtx"


def probe() -> str | None:
    """Import it in a child process; returns why that failed, or None.

    The child is a fresh interpreter with the same search path, so a crash in native code ends only the child.
    """
    code = (
        f"import sys; sys.path[:] = {sys.path!r}\n"
        "from ts_handlers.backends.tensorrt.library import ready_for_torch_tensorrt\n"
        f"with ready_for_torch_tensorrt(): import {NAME}\n"
        f"print({_MARK!r})"
    )
    with tempfile.TemporaryFile() as errors:
        try:
            child = subprocess.run(
                [sys.executable, "-c", code],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=errors,
                timeout=PROBE_SECONDS,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return f"import {NAME} does not end: it was stopped after {PROBE_SECONDS} s"
        except OSError as error:
            return f"import {NAME} could not be tried in a process of its own: {_summary(error)}"
        if child.returncode == 0 and _MARK.encode() in child.stdout:
            return None
        errors.seek(0)
        lines = errors.read()[-4000:].decode(errors="replace").strip().splitlines()
    last = lines[-1].strip() if lines else "it printed nothing"
    if child.returncode < 0:
        last = f"killed by {signal.Signals(-child.returncode).name}"
    elif child.returncode == 0 or not lines:
        last = f"it ended the process with exit code {child.returncode}"
    return f"import {NAME} fails: {last}; repair or remove the installation, or take tensorrt out of the backends"


def _import_here() -> str | None:
    tensorrt = sys.modules.get("tensorrt")
    before = set(sys.modules)
    capturing = logging._warnings_showwarning is not None  # type: ignore[attr-defined]
    reason = None
    try:
        with ready_for_torch_tensorrt():
            importlib.import_module(NAME)
    except Exception as error:
        reason = f"import {NAME} fails: {_summary(error)}; repair or remove the installation"
        for name in set(sys.modules) - before:
            if name.partition(".")[0] in (NAME, "tensorrt"):
                del sys.modules[name]
    if tensorrt is not None:
        sys.modules["tensorrt"] = tensorrt
    if not capturing:
        logging.captureWarnings(False)
    return reason


def _summary(error: BaseException) -> str:
    return one_line(f"{type(error).__name__}: {error}", 300)

"""Imports modules in the fork server, and finds those after which a fork would not be what a new process is.

A fork has one thread, whatever threads there were, and shares every open file and device with its siblings. A module
that leaves any of that behind cannot be taken out of a process again, so the fork server starts anew without it.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import re
import signal
import sys
from collections.abc import Callable
from typing import Any

_DEVICE = re.compile(r"/dev/(nvidia|kfd|dri/|accel|habana|neuron|vfio)")
_OPENBLAS = re.compile(r"(/\S*openblas[^/\s]*\.so[^/\s]*)$", re.MULTILINE)
_SETTERS = [f"{prefix}openblas_{{}}{suffix}" for prefix in ("", "scipy_") for suffix in ("", "64_")]
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGPIPE)
_QUIET = {"OPENBLAS_NUM_THREADS": "1"}
"""Set during the imports: NumPy's OpenBLAS otherwise starts a thread for each processor as soon as it is loaded."""


class Surroundings:
    """What of this process a fork would share or lose, as it is before a module is imported."""

    def __init__(self) -> None:
        self._descriptors = _descriptors()
        self._children = _children()
        self._path = list(sys.path)
        self._directory = os.getcwd()
        self._handlers = list(logging.root.handlers)
        self._signals = [signal.getsignal(number) for number in _SIGNALS]

    def problem(self) -> str | None:
        """What an import has left behind so that a fork is not safe, or not what a new process is; or None."""
        if (threads := len(os.listdir("/proc/self/task"))) > 1:
            return f"it started {threads - 1} thread(s)"
        if _children() - self._children:  # those of a server that has started anew are its clients' processes
            return "it started a process"
        torch: Any = sys.modules.get("torch")
        if torch is not None and hasattr(torch, "cuda") and torch.cuda.is_initialized():
            return "it initialised CUDA"
        for number, target in _descriptors().items():
            if _DEVICE.match(target):
                return f"it opened {target}"
            if self._descriptors.get(number) != target:
                return f"it left a file open: {target[:200]}"
        if logging.root.handlers != self._handlers:
            return "it configured the root logger"
        if [signal.getsignal(number) for number in _SIGNALS] != self._signals:
            return "it set a signal handler"
        if os.getcwd() != self._directory:
            return "it changed the working directory"
        if sys.path != self._path:
            return "it changed sys.path"
        return None


class Preload:
    """What the fork server has imported.

    Attributes
    ----------
    modules:
        Names of the modules that are imported, in order.
    failed:
        Those that could not be imported, with the reason.
    after_fork:
        Functions that a fork calls: each module's ``after_fork``, where it has one.
    """

    def __init__(self) -> None:
        self.modules: list[str] = []
        self.failed: dict[str, str] = {}
        self.after_fork: list[Callable[[], None]] = []
        self._variables: dict[str, str | None] = {}

    def import_modules(self, names: list[str]) -> tuple[str, str] | None:
        """Import modules in order; returns the first one after which a fork is not safe, and why.

        ``after_fork`` is a module's own name for a function without arguments that makes up, in each fork, for what the
        module has left out at its import.
        """
        before = dict(os.environ)
        os.environ.update({name: value for name, value in _QUIET.items() if name not in before})
        try:
            for name in names:
                surroundings = Surroundings()
                try:
                    module = importlib.import_module(name)
                except Exception as error:
                    self.failed[name] = f"{type(error).__name__}: {error}"[:500]
                else:
                    self.modules.append(name)
                    if callable(hook := vars(module).get("after_fork")):
                        self.after_fork.append(hook)
                if (problem := surroundings.problem()) is not None:
                    return name, problem
        finally:
            for name in _QUIET.keys() - before.keys():
                os.environ.pop(name, None)
        changed = {name for name in {*before, *os.environ} if before.get(name) != os.environ.get(name)}
        self._variables = {name: os.environ.get(name) for name in changed}
        return None

    def apply_variables(self) -> None:
        """In a fork with a new environment, change it as the imports have changed that of the fork server."""
        for name, value in self._variables.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def openblas_libraries() -> list[str]:
    """Paths of the OpenBLAS libraries that this process has loaded."""
    with contextlib.suppress(OSError), open("/proc/self/maps", encoding="utf-8", errors="surrogateescape") as file:
        return sorted(set(_OPENBLAS.findall(file.read())))
    return []


def give_openblas_its_threads(libraries: list[str]) -> None:
    """Give OpenBLAS the threads that it has where it is loaded with this process's environment."""
    import ctypes

    for path in libraries:
        library = ctypes.CDLL(path)
        for form in _SETTERS:
            if hasattr(library, form.format("set_num_threads")):
                most = int(getattr(library, form.format("get_num_procs"))())
                getattr(library, form.format("set_num_threads"))(openblas_threads(most))


def openblas_threads(most: int) -> int:
    """How many threads OpenBLAS takes by its variables, of `most` processors."""
    for name in ("OPENBLAS_NUM_THREADS", "OPENBLAS_DEFAULT_NUM_THREADS", "GOTO_NUM_THREADS", "OMP_NUM_THREADS"):
        value = os.environ.get(name, "").partition(",")[0].strip()
        if value.isdigit() and int(value) > 0:
            return min(int(value), most)
    return most


def _descriptors() -> dict[int, str]:
    found = {}
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # that of the listing
            found[int(name)] = os.readlink(f"/proc/self/fd/{name}")
    return found


def _children() -> set[str]:
    try:
        with open(f"/proc/self/task/{os.getpid()}/children", encoding="ascii") as file:
            return set(file.read().split())
    except OSError:  # a kernel without it
        return set()

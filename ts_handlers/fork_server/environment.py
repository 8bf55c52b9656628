"""Whether a process of the fork server would be what a new interpreter is: environment, search path, changed files.

What the interpreter, the loader and the imported modules have read from the environment is the fork server's. So a
variable that differs makes an ordinary process, unless it is one of `IGNORED`, or ``PYTHONPATH``, which is applied.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Mapping

IGNORED = frozenset(
    [
        *("PYTHONPATH", "PWD", "OLDPWD", "SHLVL", "_", "LS_COLORS", "LOG_LOCATION", "METRICS_LOCATION"),
        *("INVOCATION_ID", "JOURNAL_STREAM", "SYSTEMD_EXEC_PID", "MANAGERPID", "MANAGERPIDFDID", "NOTIFY_SOCKET"),
        *("WATCHDOG_PID", "WATCHDOG_USEC", "LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES", "CREDENTIALS_DIRECTORY"),
        *("RUNTIME_DIRECTORY", "STATE_DIRECTORY", "CACHE_DIRECTORY", "LOGS_DIRECTORY", "CONFIGURATION_DIRECTORY"),
        *("MEMORY_PRESSURE_WATCH", "MEMORY_PRESSURE_WRITE"),
    ]
)
"""Variables that nothing reads while it is imported, or that the fork applies."""
IGNORED_PREFIX = "TS_HANDLERS_"
"""This package reads its own variables when it uses them."""
_SHOWN = 5
_CUSTOMIZE = ("sitecustomize", "usercustomize")


def difference(before: Mapping[str, str], wanted: Mapping[str, str]) -> str | None:
    """Says which variables that matter differ, or None.

    Parameters
    ----------
    before:
        The environment that the fork server was started with.
    wanted:
        That of the process.

    Examples
    --------
    >>> difference({"OMP_NUM_THREADS": "1", "PWD": "/"}, {"OMP_NUM_THREADS": "2", "PWD": "/tmp"})
    'the environment differs from its own in OMP_NUM_THREADS'
    """
    names = sorted(
        name
        for name in {*before, *wanted}
        if before.get(name) != wanted.get(name) and name not in IGNORED and not name.startswith(IGNORED_PREFIX)
    )
    if not names:
        return None
    shown = ", ".join(name[:64] for name in names[:_SHOWN])
    return f"the environment differs from its own in {shown}" + (" and others" if len(names) > _SHOWN else "")


def paths_of(environment: Mapping[str, str], directory: str) -> list[str]:
    """The folders that ``PYTHONPATH`` names, as the interpreter takes them: absolute, each once, empty for here."""
    value = environment.get("PYTHONPATH", "")
    entries = value.split(os.pathsep) if value else []
    return list(dict.fromkeys(os.path.abspath(os.path.join(directory, entry)) for entry in entries))


class SearchPath:
    """The search path of the fork server without what is its own, to make another process's of it.

    Parameters
    ----------
    environment, directory:
        With which the fork server was started.
    """

    def __init__(self, environment: Mapping[str, str], directory: str) -> None:
        self.own = paths_of(environment, directory)
        self._base = [entry for entry in sys.path if entry not in self.own]

    def of(self, script: str, named: Iterable[str]) -> list[str]:
        """The search path of an interpreter that runs a script, with the folders that ``PYTHONPATH`` names."""
        named = list(named)
        return [os.path.dirname(script), *named, *(entry for entry in self._base if entry not in named)]

    def problem(self, named: list[str], modules: Iterable[str]) -> str | None:
        """Why modules imported with the fork server's path are not those of another path, or None.

        Parameters
        ----------
        named:
            The folders of the process's ``PYTHONPATH``.
        modules:
            Names of the imported modules.
        """
        if named[: len(self.own)] != self.own:
            return f"PYTHONPATH does not begin with its own, {os.pathsep.join(self.own)[:500] or 'which is empty'}"
        top = {name.partition(".")[0] for name in modules} - {"__main__"}
        top.update(_CUSTOMIZE)
        for folder in named[len(self.own) :]:
            for entry in _entries(folder):
                if entry.partition(".")[0] in top and _is_module(folder, entry):
                    return f"{os.path.join(folder, entry)} would take the place of a module that it has imported"
        return None


def _entries(folder: str) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except OSError:
        return []


def _is_module(folder: str, entry: str) -> bool:
    name, dot, ending = entry.partition(".")
    if dot:
        return ending in ("py", "pyc") or ending.endswith("so")
    return os.path.isdir(os.path.join(folder, name)) and any(
        each.startswith("__init__.") for each in _entries(os.path.join(folder, name))
    )


class Files:
    """The files of the imported modules as they were when they were imported."""

    def __init__(self) -> None:
        self._seen: dict[str, tuple[int, int, int] | None] = {}
        self._modules: set[str] = set()

    def note(self) -> None:
        """Note the files of all modules that have been imported since the last time."""
        for name, module in list(sys.modules.items()):
            if name in self._modules:
                continue
            self._modules.add(name)
            path = getattr(getattr(module, "__spec__", None), "origin", None)
            if isinstance(path, str) and path.startswith("/") and path not in self._seen:
                self._seen[path] = _identity(path)

    def changed(self) -> str | None:
        """A file that is not as it was, or None."""
        return next((path for path, seen in self._seen.items() if _identity(path) != seen), None)


def _identity(path: str) -> tuple[int, int, int] | None:
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns

"""Whether a process of the fork server would be what a new interpreter is: environment, search path, changed files.

What the interpreter, the loader and the imported modules have read from the environment is the fork server's. So a
variable that differs makes an ordinary process, unless it is one of `IGNORED`, or ``PYTHONPATH``, which is applied.
"""

from __future__ import annotations

import array
import os
import sys
from collections.abc import Iterable, Mapping, Set

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

    def problem(self, named: list[str], top: Set[str]) -> str | None:
        """Why modules imported with the fork server's path are not those of another path, or None.

        Parameters
        ----------
        named:
            The folders of the process's ``PYTHONPATH``.
        top:
            Names of the imported top-level modules.
        """
        if named[: len(self.own)] != self.own:
            return f"PYTHONPATH does not begin with its own, {os.pathsep.join(self.own)[:500] or 'which is empty'}"
        for folder in named[len(self.own) :]:
            for entry in _entries(folder):
                name = entry.partition(".")[0]
                if (name in top or name in _CUSTOMIZE) and _is_module(folder, entry):
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


class Imported:
    """The modules that are imported, and their files as they are; a fork compares without touching any module.

    What a fork looks at it copies, page by page: Python counts references in the objects themselves.

    Attributes
    ----------
    top:
        Names of the top-level modules and packages.
    """

    def __init__(self) -> None:
        self.top = frozenset(name.partition(".")[0] for name in sys.modules) - {"__main__"}
        specs = [getattr(module, "__spec__", None) for module in list(sys.modules.values())]
        origins = {getattr(spec, "origin", None) for spec in specs}
        paths = sorted(origin for origin in origins if isinstance(origin, str) and origin.startswith("/"))
        self._paths = b"\0".join(map(os.fsencode, paths))
        self._seen = _identities(self._paths)

    def changed(self) -> str | None:
        """A file that is not as it was, or None."""
        now = _identities(self._paths)
        if now == self._seen:
            return None
        size = len(now) // (self._paths.count(b"\0") + 1)
        place = next(at for at in range(0, len(now), size) if now[at : at + size] != self._seen[at : at + size])
        return os.fsdecode(self._paths.split(b"\0")[place // size])


def _identities(paths: bytes) -> bytes:
    """Inode, size and time of change of each file, in as many bytes for each."""
    found = array.array("q")
    for path in paths.split(b"\0"):
        try:
            status = os.stat(path)
        except OSError:
            found.extend((0, 0, 0))
        else:
            found.extend((status.st_ino, status.st_size, status.st_mtime_ns))
    return found.tobytes()

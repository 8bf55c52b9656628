"""A private working directory for Inductor's caches.

The compiler never works in the store: a shared folder is where others have met stale handles, clobbered files and lock
files in read-only folders. It works in a directory of this process, seeded from an entry and copied into one.
"""

from __future__ import annotations

import atexit
import contextlib
import getpass
import os
import shutil
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

from ts_handlers.system.locked_directory import collect_directories, make_locked_directory

_PREFIX = "ts_handlers-work-"
_lock = threading.RLock()


def make_working_directory() -> Path:
    """A directory that is removed when this process ends; those of dead processes are removed now."""
    base = Path(tempfile.gettempdir())
    collect_directories(base, f"{_PREFIX}*")
    directory, _ = make_locked_directory(base, _PREFIX)  # locked for as long as this process lives

    def remove(owner: int = os.getpid()) -> None:
        if os.getpid() == owner:
            shutil.rmtree(directory, ignore_errors=True)

    atexit.register(remove)
    return directory


def use_cache(directory: Path) -> None:
    """Point Inductor's, Triton's and the code-generation caches of this process at `directory`."""
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(directory)
    os.environ["TRITON_CACHE_DIR"] = str(directory / "triton")
    try:
        getpass.getuser()
    except (KeyError, OSError):  # a uid without a passwd entry; torch asks for the user's name
        os.environ["USER"] = f"uid{os.getuid()}"


@contextlib.contextmanager
def private_cache() -> Iterator[Path]:
    """Use a new working directory inside the block and restore the environment afterwards."""
    names = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")
    with _lock:
        before = {name: os.environ.get(name) for name in names}
        directory = make_working_directory()
        use_cache(directory)
        try:
            yield directory
        finally:
            for name, value in before.items():
                if value is None:
                    os.environ.pop(name, None)
                else:
                    os.environ[name] = value
            shutil.rmtree(directory, ignore_errors=True)

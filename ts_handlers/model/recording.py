"""What making an eager model reads from outside its archive is recorded: files, environment variables, modules.

`ts_handlers.model.watching` sees the reads. A read counts if the model's own code (`ts_handlers.model.own_code`) does
it, directly or by calling a library; what a library reads for itself, as while it is imported, is covered by its
version. A variable that a library looks up counts if its name stands in the model's own code.

docs/decisions/0024-outside-the-archive.md has the reasons.
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
import sys
import tempfile
import threading
import types
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from ts_handlers.errors import ModelError
from ts_handlers.key.outside import Surroundings
from ts_handlers.model.own_code import (
    OwnCode,
    is_installed,
    is_standard,
    literals,
    parsed,
    reached_modules,
    variables_named,
)
from ts_handlers.model.watching import watched

LIMIT = 10_000
"""How many names a record may have; a model that reads more than that has its data beside the archive."""

_KERNEL = ("/proc/", "/sys/", "/dev/", "/run/")
_RANDOM = re.compile(r"/tmp[a-z0-9_]{8}(/|$)")  # as the module tempfile names files and folders
_OWN_CACHES = ("torchinductor_", ".triton", "__pycache__")
# The standard library's code that passes a name on to `os.environ`; other code of it reads variables for itself.
_PASSES_ON = {("os", None), ("collections.abc", None), ("posixpath", "expandvars")}

_lock = threading.RLock()
_read_by: dict[str, set[str]] = {}
"""What code of a file has read in this process. A module that is imported already does not read again."""


class Recorder:
    """Notes what is read while a model is made.

    Parameters
    ----------
    surroundings:
        Gets the names at the end.
    is_keyed:
        Whether a file of the archive, given by its relative path, is in the digests of the model or of its weights.
    """

    def __init__(self, surroundings: Surroundings, is_keyed: Callable[[str], bool]) -> None:
        assert surroundings.directory is not None
        self._surroundings = surroundings
        self._is_keyed = is_keyed
        self.code = OwnCode(surroundings.directory)
        self._owner = threading.get_ident()
        self._others = set(sys._current_frames()) - {self._owner}
        self._names: dict[str, set[str]] = {}  # to the files whose code has read it
        self._doubtful: dict[str, set[str]] = {}  # variables that libraries have looked up
        self._written: set[str] = set()
        self._stamps: dict[str, tuple[int, ...] | None] = {}
        self._enumerated: dict[int, set[str]] = {}
        self._caches = _cache_folders()

    def heeds_this_thread(self) -> bool:
        """Whether this thread makes the model: those that ran before are requests' or this package's."""
        return threading.get_ident() not in self._others

    def note_open(self, path: Any, mode: Any, flags: Any, frame: types.FrameType | None) -> None:
        """A file is about to be opened; arguments as of the audit event ``open``."""
        if not isinstance(path, (str, bytes, os.PathLike)):
            return
        name = os.path.abspath(os.fsdecode(path))
        if _is_writing(mode, flags):
            self._written.add(name)
            return
        reader = self._reader(frame)
        if reader is None or name.endswith((".pyc", ".pyo")) or any(part in name for part in _OWN_CACHES):
            return
        inside = self.code.relative(name)
        if inside is not None:
            if not self._is_keyed(inside):
                self._add(f"archive:{inside}", reader, name)
        elif not self._is_covered(name) and not os.path.isdir(name):
            self._add(f"file:{name}", reader, name)

    def note_listing(self, path: Any, frame: types.FrameType | None) -> None:
        """A folder is about to be listed."""
        reader, direct = self._nearest(frame)
        if reader is None or not direct or not isinstance(path, (str, bytes, os.PathLike)):
            return
        name = os.path.abspath(os.fsdecode(path))
        if self.code.relative(name) is None and not self.code.is_archive(name) and not self._is_covered(name + os.sep):
            self._names.setdefault(f"folder:{name}", set()).add(reader)

    def note_variable(self, key: Any, frame: types.FrameType | None) -> None:
        """A variable is about to be looked up."""
        if not isinstance(key, (str, bytes)):
            return
        name = os.fsdecode(key)
        reader, direct = self._nearest(frame, _PASSES_ON)
        pending = self._enumerated.get(threading.get_ident(), set())
        if reader is not None and direct and name not in pending:
            self._names.setdefault(f"variable:{name}", set()).add(reader)
        elif self._reader(frame) is not None or name in pending:
            self._doubtful.setdefault(name, set())
        pending.discard(name)

    def note_enumeration(self, keys: Iterable[str]) -> None:
        """All variables are about to be listed: who copies the environment has not read each of them."""
        self._enumerated[threading.get_ident()] = set(keys)

    def _add(self, name: str, reader: str, path: str) -> None:
        self._names.setdefault(name, set()).add(reader)
        self._stamps.setdefault(path, _stamp(path))

    def _reader(self, frame: types.FrameType | None) -> str | None:
        """The file of the model's own code that reads, directly or by calling a library; None where none does."""
        while frame is not None:
            kind = self.code.kind(frame)
            if kind == "own":
                return frame.f_code.co_filename
            if kind in ("import", "ours"):
                return None
            frame = frame.f_back
        return None

    def _nearest(
        self, frame: types.FrameType | None, passes_on: set[tuple[str, str | None]] | None = None
    ) -> tuple[str | None, bool]:
        """`_reader`, and whether nothing but the standard library lies between; of that `passes_on`, if given."""
        direct, inner = True, frame
        while inner is not None and (kind := self.code.kind(inner)) != "own":
            module, function = str(inner.f_globals.get("__name__")), inner.f_code.co_name
            passing = passes_on is None or bool(passes_on & {(module, None), (module, function)})
            direct = direct and kind == "standard" and passing
            inner = inner.f_back
        return self._reader(frame), direct

    def _is_covered(self, path: str) -> bool:
        """Whether a file is no source of the model's: of the kernel, of a distribution, a cache, or just made."""
        if path.startswith((*_KERNEL, *self._caches)) or is_installed(path) or is_standard(path):
            return True
        if sys.prefix != sys.base_prefix and path.startswith(sys.prefix + os.sep):
            return True
        temporary = os.path.abspath(tempfile.gettempdir())
        return path.startswith(temporary + os.sep) and bool(_RANDOM.search(path[len(temporary) :]))

    def finish(self, sources: Callable[[], Iterable[str]], direct: Callable[[], Iterable[str]]) -> None:
        """Add up, and tell the surroundings.

        Parameters
        ----------
        sources:
            Gives the Python files that make the model.
        direct:
            Gives the top-level modules that the digest of the model names already.

        Raises
        ------
        ModelError
            A file changed while the model was made from it.
        """
        for path, before in self._stamps.items():
            if path not in self._written and _stamp(path) != before:
                raise ModelError(
                    f"{path} changed while the model was made from it, so nobody knows which content the model has; "
                    "start again when nothing writes to it"
                )
        for name, readers in self._names.items():
            for reader in readers:
                _read_by.setdefault(os.path.realpath(reader), set()).add(name)
        self._surroundings.learn(self._named_in(sources()))
        self._surroundings.learn_from(lambda: self._reached_from(list(sources()), set(direct())))

    def _named_in(self, files: Iterable[str]) -> set[str]:
        """What was read, and what the model's own code in these files reads or names."""
        names, strings = set(self._names), set[str]()
        for file in files:
            names |= _read_by.get(os.path.realpath(file), set())
            names |= {f"variable:{name}" for name in variables_named(parsed(file))}
            strings |= literals(parsed(file))
        prefixes = tuple(text for text in strings if text.endswith("_") and len(text) > 2)
        names |= {f"variable:{name}" for name in self._doubtful if name in strings or name.startswith(prefixes)}
        names = {name for name in names if name.partition(":")[2] not in self._written}
        if len(names) > LIMIT:
            raise ModelError(
                f"making the model reads {len(names)} files and variables outside its archive, at most {LIMIT} are "
                "kept track of; put the files into the archive"
            )
        return names

    def _reached_from(self, sources: list[str], direct: set[str]) -> set[str]:
        """Names for the modules that the sources reach, and for what the model's own code among them reads."""
        names, own = self._modules(sources, direct)
        return names | self._named_in(own)

    def _modules(self, sources: list[str], direct: set[str]) -> tuple[set[str], set[str]]:
        """Names for the modules that the sources reach, and the files of the model's own code."""
        names: set[str] = set()
        own = set(sources)
        reached = reached_modules(sources)
        outside = [module for module in reached if self.code.relative(module.file) is None]
        known = {name for top in (direct if outside else ()) for name in self.code.distributions.get(top, [])}
        for name, file in reached:
            top = name.partition(".")[0]
            inside = self.code.relative(file)
            if inside is not None:
                own.add(file)
                names |= set() if self._is_keyed(inside) else {f"archive:{inside}"}
            elif distributions := self.code.distributions.get(top):
                names |= {f"distribution:{distribution}" for distribution in distributions if distribution not in known}
            elif not is_installed(os.path.abspath(file)):
                own.add(file)
                names |= set() if top in direct else {self._module_name(top, file)}
        return names, own

    def _module_name(self, top: str, file: str) -> str:
        main = getattr(sys.modules.get(top), "__file__", None) or file
        found = self._surroundings.origin(top)
        by_name = found is not None and os.path.realpath(found) == os.path.realpath(main)
        return f"module:{top}" if by_name else f"code:{os.path.abspath(main)}"


@contextlib.contextmanager
def recording(
    surroundings: Surroundings,
    is_keyed: Callable[[str], bool],
    sources: Callable[[], Iterable[str]],
    direct: Callable[[], Iterable[str]],
) -> Iterator[None]:
    """Record what the block reads; `sources` and `direct`, as of `Recorder.finish`, are called at its end.

    Other threads that record wait. After a block that raises nothing is learnt.
    """
    with _lock:
        recorder = Recorder(surroundings, is_keyed)
        with watched(recorder, complete=not surroundings.deferred):
            yield
        recorder.finish(sources, direct)


def _is_writing(mode: Any, flags: Any) -> bool:
    if isinstance(mode, str):
        return any(letter in mode for letter in "wax+")
    return isinstance(flags, int) and bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))


def _stamp(path: str) -> tuple[int, ...] | None:
    try:
        status = os.stat(path)
    except OSError:
        return None
    if not stat.S_ISREG(status.st_mode):
        return (0,)  # its time says nothing
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _cache_folders() -> tuple[str, ...]:
    """Folders that hold copies of what lies elsewhere, by the variables that libraries take for them."""
    home = os.path.expanduser("~/.cache")
    set_by = ("XDG_CACHE_HOME", "HF_HOME", "HF_HUB_CACHE", "TORCH_HOME", "TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR")
    folders = [home, *(os.environ[name] for name in set_by if os.environ.get(name))]
    return tuple(os.path.abspath(folder) + os.sep for folder in folders)

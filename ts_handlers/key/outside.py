"""What shapes a model from outside its archive: names, and their values as they are now.

A name says what making the eager model has read, `ts_handlers.model.recording` finds it, and the store keeps it::

    variable:SCALE          an environment variable
    file:/etc/app.json      a file, or a folder with all that it holds
    folder:/data/labels     which names a folder lists
    archive:vocab.txt       a file of the archive that is left out of the digest of the model
    distribution:pillow     an installed distribution, by its version
    module:helpers          a module or package of no distribution, by the digest of its files
    code:/opt/x/helpers.py  the same by its path, where Python's search path does not lead to it

What the names stand for is looked up at each start, without importing anything. The key's part ``outside`` has a word
``name=value`` for each of them; without names there is no such part.
"""

from __future__ import annotations

import contextlib
import importlib.machinery
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from urllib.parse import quote

from ts_handlers.key import fingerprint
from ts_handlers.key.digests import DigestFile, digest_file, digest_text
from ts_handlers.key.names import NO_NAMES, Names

ABSENT = "absent"
SHOWN = 64
"""How many words the part holds; a digest stands for the rest."""
LARGE = 1 << 20
"""Bytes from which a file's digest is remembered between starts; looking it up costs as much as hashing less."""
_DIGITS = 16


class Surroundings:
    """Where a model is made: what the names stand for, each looked up once for a source.

    Parameters
    ----------
    directory:
        The unpacked archive; None for a model of which nothing is recorded.

    Attributes
    ----------
    seen:
        What making the eager model has read so far, without the libraries and modules that `names` adds.
    deferred:
        Whether what takes long to find out waits until `names` is asked for it.
    environment:
        The variables as they were before the model's own code could change them.
    """

    def __init__(self, directory: Path | None = None) -> None:
        self.directory = directory
        self.seen: Names = NO_NAMES
        self.deferred = False
        self._later: list[Callable[[], Iterable[str]]] = []
        self.environment = dict(os.environ)
        self.digest_file: DigestFile = digest_file
        self._search = list(sys.path)
        self._values: dict[str, str] = {}

    def value(self, name: str) -> str:
        """What a name stands for now; ``absent`` where there is no such thing."""
        if name not in self._values:
            self._values[name] = self._compute(name)
        return self._values[name]

    def variables(self, names: Iterable[str]) -> dict[str, str | None]:
        """The environment variables among names, with their values; another process must have them to make the same."""
        subjects = [name.partition(":")[2] for name in names if name.startswith("variable:")]
        return {subject: self.environment.get(subject) for subject in sorted(subjects)}

    @property
    def names(self) -> Names:
        """What making the eager model has read so far, with the libraries and modules that it reaches."""
        while self._later:
            self.learn(self._later.pop()())
        return self.seen

    def learn(self, names: Iterable[str]) -> None:
        """Add what was read; files are looked up again, as they were read after the first look."""
        self.seen |= frozenset(names)
        self._values.clear()

    def learn_from(self, find: Callable[[], Iterable[str]]) -> None:
        """Add what a function finds: now, or, inside `deferring`, when `names` is asked for it."""
        if self.deferred:
            self._later.append(find)
        else:
            self.learn(find())

    @contextlib.contextmanager
    def deferring(self) -> Iterator[None]:
        """For a start that hits: it needs to know only what was seen."""
        before, self.deferred = self.deferred, True
        try:
            yield
        finally:
            self.deferred = before

    def _compute(self, name: str) -> str:
        kind, _, subject = name.partition(":")
        if kind == "variable":
            value = self.environment.get(subject)
            return ABSENT if value is None else digest_text(value)[:_DIGITS]
        if kind == "distribution":
            return fingerprint.distribution_version(subject) or ABSENT
        if kind == "module":
            origin = self.origin(subject)
            return ABSENT if origin is None else fingerprint.digest_module(origin)
        if kind == "archive":
            return self._digest(self.absolute(subject))
        if kind == "folder":
            return _listing(subject)
        if kind == "code" and os.path.exists(subject):
            return fingerprint.digest_module(subject)
        return self._digest(Path(subject))

    def origin(self, module: str) -> str | None:
        """The file of a top-level module, by the search path as it was before the model's own code."""
        spec = importlib.machinery.PathFinder.find_spec(module, self._search)
        return None if spec is None or spec.origin is None or not os.path.isfile(spec.origin) else spec.origin

    def absolute(self, path: str) -> Path:
        """A path, relative to the archive where it is not absolute."""
        expanded = os.path.expanduser(path)
        return Path(os.path.abspath(os.path.join(self.directory or os.getcwd(), expanded)))

    def _digest(self, path: Path) -> str:
        try:
            if path.is_dir():
                files = sorted(item for item in path.rglob("*") if item.is_file())
                facts = [f"{item.relative_to(path).as_posix()}={self._digest_file(item)}" for item in files]
                return digest_text("\n".join(facts))[:_DIGITS]
            return self._digest_file(path)[:_DIGITS] if path.is_file() else ABSENT
        except OSError as error:
            return f"unreadable-{error.errno}"

    def _digest_file(self, path: Path) -> str:
        return self.digest_file(path) if path.stat().st_size >= LARGE else digest_file(path)


def declared_names(surroundings: Surroundings, variables: Iterable[str], files: Iterable[str]) -> Names:
    """The names of the settings `key_environment` and `key_files`."""
    return frozenset(
        [*(f"variable:{name}" for name in variables), *(f"file:{surroundings.absolute(path)}" for path in files)]
    )


def outside_part(surroundings: Surroundings, names: Names) -> str:
    """The key's part for names: words ``name=value`` in order; of very many the last ones as one digest.

    Examples
    --------
    >>> surroundings = Surroundings()
    >>> surroundings.environment = {}
    >>> outside_part(surroundings, frozenset({"variable:SCALE"}))
    'variable:SCALE=absent'
    """
    words = [f"{quote(name, safe='/:._-+@')}={surroundings.value(name)}" for name in sorted(names)]
    rest = words[SHOWN:]
    if rest:
        words[SHOWN:] = [f"others:{len(rest)}={digest_text(' '.join(rest))[:_DIGITS]}"]
    return " ".join(words)


def _listing(folder: str) -> str:
    try:
        return digest_text("\n".join(sorted(os.listdir(folder))))[:_DIGITS]
    except OSError:
        return ABSENT

"""Which code is the model's own: files of its archive, and code on the search path that belongs to no distribution.

Installed distributions are covered by their versions, torch and the standard library by the key's other parts.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import importlib.metadata
import os
import re
import sys
import sysconfig
import types
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Literal, NamedTuple

from ts_handlers.key import fingerprint

Kind = Literal["own", "library", "standard", "import", "ours"]

COVERED = frozenset(sys.stdlib_module_names) | {"torch", "functorch", "torchgen", "ts_handlers", "ts", "__main__"}
"""Top-level modules that other parts of the key stand for."""
_OURS = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep
_PATHS = sysconfig.get_paths()
_STANDARD = tuple(os.path.abspath(_PATHS[name]) + os.sep for name in ("stdlib", "platstdlib"))
_INSTALLED = tuple(os.path.abspath(_PATHS[name]) + os.sep for name in ("purelib", "platlib"))


def is_installed(path: str) -> bool:
    """Whether a path lies where distributions are installed."""
    return path.startswith(_INSTALLED) or "/site-packages/" in path or "/dist-packages/" in path


def is_standard(path: str) -> bool:
    """Whether a path lies in the standard library."""
    return path.startswith(_STANDARD) and not is_installed(path)


class OwnCode:
    """Tells a model's own code from that of others.

    Parameters
    ----------
    directory:
        The unpacked archive.
    """

    def __init__(self, directory: Path) -> None:
        self._roots = tuple({os.path.abspath(directory) + os.sep, os.path.realpath(directory) + os.sep})
        self._kinds: dict[str, Kind] = {}

    @functools.cached_property
    def distributions(self) -> Mapping[str, list[str]]:
        """The distributions behind top-level modules; those in editable mode are left out, whose files are digested."""
        return _distributions(tuple((folder, _modified(folder)) for folder in sys.path))

    def relative(self, path: str) -> str | None:
        """A path relative to the archive; None outside it."""
        for candidate in (os.path.abspath(path), os.path.realpath(path)):
            for root in self._roots:
                if candidate.startswith(root):
                    return candidate[len(root) :]
        return None

    def is_archive(self, path: str) -> bool:
        """Whether a path is the archive's folder itself."""
        return os.path.realpath(path) + os.sep in self._roots

    def kind(self, frame: types.FrameType) -> Kind:
        """Whose code runs in a frame."""
        name = frame.f_code.co_filename
        if name not in self._kinds:
            self._kinds[name] = self._classify(name, str(frame.f_globals.get("__name__", "")))
        return self._kinds[name]

    def _classify(self, file: str, module: str) -> Kind:
        if file.startswith("<"):
            return "import" if file == "<frozen importlib._bootstrap>" else "standard"
        if self.relative(file) is not None:
            return "own"
        file = os.path.abspath(file)
        if file.startswith(_OURS):
            return "ours"
        if is_standard(file):
            return "standard"
        return "library" if is_installed(file) or module.partition(".")[0] in self.distributions else "own"


@functools.lru_cache(maxsize=4)
def _distributions(search: tuple[tuple[str, int], ...]) -> Mapping[str, list[str]]:
    """Reads the record of every distribution, which takes a quarter of a second for a hundred of them."""
    found = importlib.metadata.packages_distributions()
    editable = {name for names in found.values() for name in names if fingerprint.is_editable(name)}
    return {module: fixed for module, names in found.items() if (fixed := sorted(set(names) - editable))}


def _modified(folder: str) -> int:
    try:
        return os.stat(folder or ".").st_mtime_ns
    except OSError:
        return 0


class Reached(NamedTuple):
    """A module that making the model can have used; `file` is its source or library."""

    name: str
    file: str


def reached_modules(files: Iterable[str]) -> list[Reached]:
    """The loaded modules that the code of files refers to, and those that these refer to, and so on.

    A module refers to another one by a global, which is that module, or a class, function or object of it, or by an
    import statement anywhere in its source: of a constant that was imported nothing says where it comes from. What
    `COVERED` names is left out, with what only that refers to.
    """
    files = [os.path.realpath(file) for file in files]
    ends = tuple(os.path.basename(file) for file in files)
    waiting = [name for name, file in _loaded_files() if file.endswith(ends) and os.path.realpath(file) in files]
    waiting += [name for file in files for name in full_imports(parsed(file))]
    seen: set[str] = set()
    found = []
    while waiting:
        name = waiting.pop()
        module = sys.modules.get(name)
        if name in seen or module is None or name.partition(".")[0] in COVERED:
            continue
        seen.add(name)
        if isinstance(file := getattr(module, "__file__", None), str):
            found.append(Reached(name, file))
            waiting += _statements(file, _modified(file)) if file.endswith(".py") else ()
        waiting += _referred(module)
        waiting += [name.rpartition(".")[0]] if "." in name else []
    return sorted(found)


def _loaded_files() -> list[tuple[str, str]]:
    loaded = [(name, vars(module).get("__file__")) for name, module in list(sys.modules.items()) if _is_module(module)]
    return [(name, file) for name, file in loaded if isinstance(file, str)]


def _is_module(value: object) -> bool:
    return issubclass(type(value), types.ModuleType)


def _referred(module: object) -> set[str]:
    """Names of the modules that a module's globals belong to; `__getattr__` of lazy objects is not called."""
    names = set()
    for value in list(vars(module).values()) if _is_module(module) else []:
        kind = type(value)
        if issubclass(kind, types.ModuleType):
            names.add(vars(value).get("__name__"))
        elif issubclass(kind, (type, types.FunctionType)):
            names.add(vars(value).get("__module__") or getattr(value, "__module__", None))
        else:
            names.add(vars(kind).get("__module__"))
    return {name for name in names if isinstance(name, str)}


_STATEMENT = re.compile(rb"^[ \t]*(?:from[ \t]+([A-Za-z_][\w.]*)[ \t]+import\b|import[ \t]+([A-Za-z_][^#;\n]*))", re.M)


@functools.lru_cache(maxsize=8192)
def _statements(file: str, modified: int) -> tuple[str, ...]:
    """Names in the import statements of a file, found by a pattern: a large library has thousands of files."""
    try:
        text = Path(file).read_bytes()
    except OSError:
        return ()
    names: set[str] = set()
    for source, modules in _STATEMENT.findall(text):
        for name in (source or modules).decode("utf-8", "replace").split(","):
            words = name.split()
            names |= {words[0], words[0].partition(".")[0]} if words else set()
    return tuple(sorted(names))


@functools.lru_cache(maxsize=512)
def _parse(path: str, modified: int) -> ast.Module | None:
    try:
        return ast.parse(Path(path).read_bytes())
    except (OSError, SyntaxError, ValueError, RecursionError):
        return None


def parsed(path: str) -> ast.Module | None:
    """The syntax tree of a Python file; None where it is none."""
    if not path.endswith(".py"):
        return None
    with contextlib.suppress(OSError):
        return _parse(path, os.stat(path).st_mtime_ns)
    return None


def full_imports(tree: ast.Module | None) -> Iterator[str]:
    """Dotted names of the modules that a file imports absolutely, wherever in it."""
    for node in ast.walk(tree) if tree is not None else ():
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def literals(tree: ast.Module | None) -> set[str]:
    """The strings in a file that could name an environment variable."""
    nodes = ast.walk(tree) if tree is not None else ()
    found = {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    return {text for text in found if text.isidentifier()}


def variables_named(tree: ast.Module | None) -> set[str]:
    """The environment variables that a file reads by name, as in ``os.environ["SCALE"]``, wherever in it.

    Examples
    --------
    >>> sorted(variables_named(ast.parse("import os; os.getenv('A'); os.environ['B']; 'C' in os.environ")))
    ['A', 'B', 'C']
    """
    found = set()
    for node in ast.walk(tree) if tree is not None else ():
        subject: ast.expr | None = None
        if isinstance(node, ast.Subscript) and _last_name(node.value) == "environ":
            subject = node.slice
        elif isinstance(node, ast.Compare) and any(_last_name(side) == "environ" for side in node.comparators):
            subject = node.left
        elif isinstance(node, ast.Call) and node.args:
            reads = isinstance(node.func, ast.Attribute) and _last_name(node.func.value) == "environ"
            subject = node.args[0] if reads or _last_name(node.func) == "getenv" else None
        if isinstance(subject, ast.Constant) and isinstance(subject.value, str):
            found.add(subject.value)
    return found


def _last_name(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return node.attr
    return node.id if isinstance(node, ast.Name) else ""

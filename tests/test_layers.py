"""The package's floor plan: which room may import which, and that nothing imports in a circle.

`LAYERS` is the sentence of docs/architecture.md: a room imports only those to its left. Imports inside functions and
under ``TYPE_CHECKING`` count.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

import ts_handlers

PACKAGE = "ts_handlers"
LAYERS = (
    ("errors", "version", "system", "metrics"),
    ("fork_server",),
    ("settings", "key"),
    ("model",),
    ("execution",),
    ("backends", "guard"),
    ("monitoring",),
    ("store",),
    ("compiled_model", "doctor", "exporter"),
    ("result_cache",),
    ("startup",),
    ("model_process",),
    ("start",),
    ("servers",),
    ("__init__",),
    ("cli",),
)
"""Rooms from the lowest to the highest; those in one row may import each other, but not in a circle."""
APART = ("testing",)
"""Rooms that import nothing of the package, and that nothing of the package imports."""

Sources = Mapping[str, str]


def package_sources() -> dict[str, str]:
    """Source texts of the package by module name; a folder's ``__init__`` has the folder's name."""
    root = Path(ts_handlers.__file__).parent
    found = {}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if parts[-1] == "__init__" and len(parts) > 1:
            parts = parts[:-1]
        found[".".join((PACKAGE, *parts))] = path.read_text("utf-8")
    return found


def imported_modules(source: str, modules: Sources) -> Iterator[tuple[int, str]]:
    """Line and name of each module of the package that a source imports, wherever in it the import stands."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            below = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [(node.lineno, name if name in modules else str(node.module)) for name in below]
        else:
            continue
        for line, name in names:
            if name == PACKAGE:
                yield line, f"{PACKAGE}.__init__"
            elif name.startswith(f"{PACKAGE}."):
                yield line, name


def room(module: str) -> str:
    """The room of a module: the first part of its name below the package."""
    return module.split(".")[1]


def breaches(modules: Sources) -> list[str]:
    """Imports from a room to one that stands later in `LAYERS`, or from or to one that stands apart."""
    level = {name: index for index, row in enumerate(LAYERS) for name in row}
    found = []
    for module, source in modules.items():
        here = room(module)
        if here not in level and here not in APART:
            found.append(f"{module}: the room {here} has no place in LAYERS")
            continue
        for line, other in imported_modules(source, modules):
            there = room(other)
            if here == there:
                continue
            if here in APART or there in APART or level[there] > level[here]:
                found.append(f"{module}:{line} imports {other}")
    return found


def circles(modules: Sources) -> list[str]:
    """Groups of files, or of folders beside files, that import each other in a circle, lazily or not.

    In each folder its files and its sub-folders are looked at as a whole: an import of a file in a sub-folder is one of
    that sub-folder. So no circle leads through several files of two folders either.
    """
    arrows: dict[str, dict[str, set[str]]] = {}
    for module, source in modules.items():
        for _, other in imported_modules(source, modules):
            ours, theirs = [*_place(module, modules)], [*_place(other, modules)]
            depth = next((n for n, pair in enumerate(zip(ours, theirs, strict=False)) if pair[0] != pair[1]), None)
            if depth is not None:
                folder = arrows.setdefault(".".join(ours[:depth]), {})
                folder.setdefault(ours[depth], set()).add(theirs[depth])
    return sorted(f"{folder}: {group}" for folder, inside in arrows.items() for group in _groups(inside))


def _place(module: str, modules: Sources) -> list[str]:
    """The folders above a file, and the file; a folder's own file is its ``__init__``."""
    parts = module.split(".")
    return [*parts, "__init__"] if any(name.startswith(f"{module}.") for name in modules) else parts


def _groups(arrows: Mapping[str, set[str]]) -> set[str]:
    reach: dict[str, set[str]] = {}
    for start in arrows:
        seen: set[str] = set()
        waiting = [*arrows[start]]
        while waiting:
            name = waiting.pop()
            if name not in seen:
                seen.add(name)
                waiting.extend(arrows.get(name, ()))
        reach[start] = seen
    return {
        " <-> ".join(sorted(other for other in reach[name] if name in reach.get(other, ())))
        for name in arrows
        if name in reach[name]
    }


def test_rooms_import_only_those_below_them() -> None:
    assert breaches(package_sources()) == []


def test_nothing_imports_in_a_circle() -> None:
    assert circles(package_sources()) == []


def test_every_room_of_the_plan_exists() -> None:
    rooms = {room(module) for module in package_sources()}
    assert rooms == {name for row in LAYERS for name in row} | set(APART)


@pytest.mark.parametrize(
    "seeded",
    [
        "from ts_handlers.startup import fallback",
        "def later():\n    from ts_handlers.store.base import Store",
        "if TYPE_CHECKING:\n    from ts_handlers.compiled_model import CompiledModel",
        "import ts_handlers.servers.torchserve.handler",
        "import ts_handlers",
        "from ts_handlers import __version__",
        "from ts_handlers.testing import TorchServe",
    ],
)
def test_a_seeded_breach_is_found(seeded: str) -> None:
    modules = package_sources()
    modules["ts_handlers.key.parts"] += f"\n{seeded}\n"
    assert [text.partition(":")[0] for text in breaches(modules)] == ["ts_handlers.key.parts"]


def test_a_seeded_room_is_found() -> None:
    modules = {**package_sources(), "ts_handlers.drawer.things": ""}
    assert breaches(modules) == ["ts_handlers.drawer.things: the room drawer has no place in LAYERS"]


def test_a_seeded_circle_is_found() -> None:
    modules = package_sources()
    modules["ts_handlers.system.durations"] += "\ndef later():\n    from ts_handlers.system import processors\n"
    modules["ts_handlers.system.processors"] += "\nfrom ts_handlers.system.durations import duration\n"
    assert circles(modules) == ["ts_handlers.system: durations <-> processors"]


def test_a_seeded_circle_of_folders_is_found() -> None:
    modules = {
        "ts_handlers.store.local.lease": "from ts_handlers.store.upkeep import scan",
        "ts_handlers.store.upkeep.scan": "",
        "ts_handlers.store.upkeep.audit": "from ts_handlers.store.local import trash",
        "ts_handlers.store.local.trash": "",
    }
    assert circles(modules) == ["ts_handlers.store: local <-> upkeep"]

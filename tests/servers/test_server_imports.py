"""Who may know which server: TorchServe's packages are imported in its own folder and in the test harness only."""

from __future__ import annotations

import ast
from collections.abc import Iterator

import pytest

from tests.test_layers import Sources, package_sources

SERVERS = {"ts": "torchserve", "model_archiver": "torchserve"}
"""The folder of `ts_handlers.servers` that knows a package."""
HARNESS = "ts_handlers.testing"


def imports_of_servers(modules: Sources) -> list[str]:
    """Imports of a server's package, lazy ones too, outside the server's folder and the harness."""
    return [
        f"{module}:{line} imports {package}"
        for module, source in modules.items()
        for line, package in _packages(source)
        if package in SERVERS
        and not f"{module}.".startswith((f"ts_handlers.servers.{SERVERS[package]}.", f"{HARNESS}."))
    ]


def _packages(source: str) -> Iterator[tuple[int, str]]:
    for node in ast.walk(ast.parse(source)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [str(node.module)]
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") in ("import_module", "find_spec"):
            names = [str(argument.value) for argument in node.args[:1] if isinstance(argument, ast.Constant)]
        for name in names:
            yield node.lineno, name.partition(".")[0]


def test_only_the_servers_folder_imports_it() -> None:
    assert imports_of_servers(package_sources()) == []


@pytest.mark.parametrize(
    "seeded",
    [
        "import ts",
        "def later():\n    from ts.context import Context",
        "import importlib\nimportlib.import_module('ts.service')",
        "from model_archiver.model_packaging import package_model",
    ],
)
def test_a_seeded_import_is_found(seeded: str) -> None:
    modules = {"ts_handlers.startup.attempt": seeded, "ts_handlers.servers.torchserve.recipes": seeded}
    (found,) = imports_of_servers(modules)
    assert found.startswith("ts_handlers.startup.attempt:")

"""The examples in the package's docstrings run, and there are some."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest

import ts_handlers

MODULES = sorted(
    info.name
    for info in pkgutil.walk_packages(ts_handlers.__path__, "ts_handlers.")
    if not info.name.startswith("ts_handlers.testing")
)
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


NEED_TORCHSERVE = {f"ts_handlers.servers.torchserve.{name}" for name in ("handler", "compiled_handler")}
STARTS_A_PROCESS = "ts_handlers.system.child_process"


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.processes] * (name == STARTS_A_PROCESS)) for name in MODULES]
)
def test_examples_run(name: str) -> None:
    if name in NEED_TORCHSERVE:
        pytest.importorskip("ts", reason="TorchServe is not installed")
    result = doctest.testmod(importlib.import_module(name), optionflags=FLAGS)
    assert result.failed == 0


def test_there_are_examples() -> None:
    finder = doctest.DocTestFinder(exclude_empty=True)
    modules = [importlib.import_module(name) for name in MODULES if name not in NEED_TORCHSERVE]
    assert sum(len(test.examples) for module in modules for test in finder.find(module)) >= 5

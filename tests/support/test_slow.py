"""What continuous integration leaves out."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests.support.slow import SLOW

TESTS = Path(__file__).parents[1]


@pytest.mark.parametrize("file", SLOW)
def test_each_named_test_exists(file: str) -> None:
    tree = ast.parse((TESTS / file).read_text("utf-8"))
    found = {node.name for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")}
    assert set(SLOW[file]) <= found

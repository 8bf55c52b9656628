"""The layout of a store is written in one file: no other one spells the name of a folder or file out."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import ts_handlers
from ts_handlers.store.local import layout

ROOT = Path(ts_handlers.__file__).parent
OWNERS = {
    layout.MARKERS: "guard/state_directory.py",
    layout.RECORDS: "guard/state_directory.py",
    "timing": "backends/tensorrt/backend.py",
}
"""Files that name a folder which `layout` lists and cannot name itself, because they lie below the store."""
FOLDERS = (
    *(layout.ENTRIES, layout.CANARIES, layout.LEASES, layout.REMOTE, layout.STAGING, layout.TRASH, layout.USAGE),
    *(layout.PINS, layout.VERIFIED, layout.SHARED, *OWNERS),
)
PARTS = (layout.FETCH_LOCK, layout.OUTCOME, layout.UNSENT, layout.EVICTED, layout.REASON)
"""Endings, beginnings and names of files that nothing else in the package is called."""
PATH_CALLS = ("Path", "joinpath", "with_name", "glob", "rglob", "join")


def spelled_out(source: str) -> Iterator[tuple[int, str]]:
    """Line and text of each string that names a part of a store's layout and is used as a path or as part of one."""
    tree = ast.parse(source)
    docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    as_path: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div):
            as_path |= {id(node.left), id(node.right)}
        elif isinstance(node, ast.Call):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            as_path |= {id(argument) for argument in node.args} if name in PATH_CALLS else set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            text = node.value
            first, slash, _ = text.partition("/")
            is_folder = first in FOLDERS and (slash or id(node) in as_path)
            if is_folder or any(part in text for part in PARTS):
                yield node.lineno, text


def owners_of_names() -> set[str]:
    return {"store/local/layout.py", *OWNERS.values()}


def test_no_other_file_spells_a_name_of_the_layout_out() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{line}: {text!r}"
        for path in sorted(ROOT.rglob("*.py"))
        if path.relative_to(ROOT).as_posix() not in owners_of_names()
        for line, text in spelled_out(path.read_text("utf-8"))
    ]
    assert found == []


@pytest.mark.parametrize(("name", "owner"), OWNERS.items())
def test_names_from_below_the_store_stand_in_one_file(name: str, owner: str) -> None:
    assert (ROOT / owner).read_text("utf-8").count(f'"{name}"') == 1
    assert f"{name}/" in str(layout.__doc__)


def test_the_tree_shows_every_folder() -> None:
    assert [name for name in FOLDERS if f"    {name}/" not in str(layout.__doc__)] == []


@pytest.mark.parametrize(
    "seeded",
    [
        'folder = root / "entries" / key',
        'folder = root.joinpath("canaries", key)',
        'name = f"leases/{key}"',
        'path = folder / f"{key}.outcome"',
        'marker = f"unsent-{key}"',
        'text = (trash / "reason.txt").read_text()',
        'path = root / "guards"',
    ],
)
def test_a_seeded_name_is_found(seeded: str) -> None:
    assert len(list(spelled_out(seeded))) == 1


def test_other_uses_of_the_words_are_none_of_its_business() -> None:
    assert (
        list(spelled_out('"""See entries/<key>."""\nfacts = {"entries": 3, "shared": True}\nscratch = "shared"')) == []
    )

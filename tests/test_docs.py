"""The documentation names only files, modules, headings and tests that exist, and says what holds its promises."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.test_layers import APART, LAYERS, PACKAGE

ROOT = Path(__file__).parent.parent
DOCUMENTS = sorted(
    [
        *ROOT.glob("*.md"),
        *ROOT.glob("docs/**/*.md"),
        *ROOT.glob("benchmarks/*.md"),
        *ROOT.glob("examples/*/*.md"),
    ]
)
SOURCES = sorted([*ROOT.glob("ts_handlers/**/*.py"), *ROOT.glob("benchmarks/*.py"), ROOT / "pyproject.toml"])

TOP_FOLDERS = ("ts_handlers", "tests", "benchmarks", "docs", "scripts", "examples")
OTHER_PROJECTS = ("torch", "torch_tensorrt", "c10", "ATen")
"""First folders of paths in the source of somebody else."""

_PATH = re.compile(rf"(?<![\w./<>-])(?:{'|'.join(TOP_FOLDERS)})/[\w./*-]*[\w*/]")
_PYTHON_FILE = re.compile(r"`([\w./-]+\.py)`")
_DOTTED = re.compile(r"(?<![\w./-])ts_handlers(?:\.[A-Za-z_]\w*)+")
_TEST = re.compile(r"(tests/[\w./-]+\.py)(?:::(\w+))?")
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
_CODE_BLOCK = re.compile(r"^```.*?^```", re.DOTALL | re.MULTILINE)


def missing_paths(text: str, folder: Path) -> list[str]:
    """Paths in `text` that lead nowhere, from the repository's root or, for files in backticks, from nearer folders.

    Parameters
    ----------
    text:
        Markdown, or source code.
    folder:
        Where the text lies.
    """
    missing = [path for path in _PATH.findall(text) if not _exists(ROOT, path)]
    for path in _PYTHON_FILE.findall(text):
        first, slash, _ = path.partition("/")
        if first in TOP_FOLDERS or first in OTHER_PROJECTS:
            continue
        places = (folder, ROOT / "ts_handlers", ROOT / "ts_handlers" / "servers", ROOT / "ts_handlers" / "store")
        found = any(_exists(place, path) for place in places) if slash else any(_named(path))
        if not found:
            missing.append(path)
    return missing


def _exists(folder: Path, path: str) -> bool:
    return any(folder.glob(path.rstrip("/"))) if "*" in path else (folder / path).exists()


def _named(name: str) -> Iterator[Path]:
    """Files of that name, wherever they lie."""
    return (path for top in TOP_FOLDERS for path in (ROOT / top).rglob(name))


def missing_names(text: str) -> list[str]:
    """Dotted names in `text` that are neither a module nor an attribute of one."""
    return [name for name in _DOTTED.findall(text) if not _resolves(name)]


def _resolves(name: str) -> bool:
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:length]))
        except ModuleNotFoundError as error:
            if error.name is None or error.name.split(".")[0] != PACKAGE:
                pytest.skip(f"{error.name} is not installed")
            continue
        for attribute in parts[length:]:
            if not hasattr(found, attribute):
                return False
            found = getattr(found, attribute)
        return True
    return False


def missing_tests(text: str) -> list[str]:
    """Tests in `text`, written as ``tests/<file>.py::<function>``, whose function is not in that file."""
    return [
        f"{path}::{name}"
        for path, name in _TEST.findall(text)
        if name and (ROOT / path).exists() and not re.search(rf"^def {name}\(", (ROOT / path).read_text("utf-8"), re.M)
    ]


HELD_BY = "held by"
"""Title of the last column of a table of promises: the tests that hold them, or why none can."""
NOT_TESTED = "not tested: "


def unheld_promises(text: str) -> list[str]:
    """First cells of the rows of promises of which nothing says what holds them: no existing test, and no reason."""
    found, is_table = [], False
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split(" | ")]
        if not line.startswith("|"):
            is_table = False
        elif cells[-1] == HELD_BY:
            is_table = True
        elif is_table and set(line) - set("|- "):
            tests = [path for path, _ in _TEST.findall(cells[-1])]
            if not (tests or NOT_TESTED in cells[-1]) or not all((ROOT / path).exists() for path in tests):
                found.append(cells[0])
    return found


def broken_links(text: str, document: Path) -> list[str]:
    """Links in `text` whose file, or whose heading in a Markdown file, does not exist; web links are not tried."""
    broken = []
    for link in _LINK.findall(_CODE_BLOCK.sub("", text)):
        if "://" in link or link.startswith("mailto:"):
            continue
        path, _, heading = link.partition("#")
        target = document.parent / path if path else document
        if path and not target.exists():
            broken.append(link)
            continue
        if heading and heading not in headings(target.read_text("utf-8") if path else text):
            broken.append(link)
    return broken


def headings(text: str) -> set[str]:
    """The anchors of a Markdown text, made as GitHub makes them.

    Examples
    --------
    >>> sorted(headings("# One\\n## `pt2: compile:`\\n### A, b"))
    ['a-b', 'one', 'pt2-compile']
    """
    titles = re.findall(r"^#+ (.+)$", _CODE_BLOCK.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_a_document_names_only_paths_that_exist(document: Path) -> None:
    assert missing_paths(document.read_text("utf-8"), document.parent) == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_a_document_names_only_modules_and_attributes_that_exist(document: Path) -> None:
    assert missing_names(document.read_text("utf-8")) == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_a_document_names_only_tests_that_exist(document: Path) -> None:
    assert missing_tests(document.read_text("utf-8")) == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_every_promise_of_a_table_is_held_by_a_test(document: Path) -> None:
    assert unheld_promises(document.read_text("utf-8")) == []


def test_what_is_defended_and_the_decisions_behind_it_say_which_tests_hold_it() -> None:
    security = ROOT / "docs" / "security.md"
    text = security.read_text("utf-8")
    cited = [link for link in _LINK.findall(text) if link.startswith("decisions/")]
    assert cited
    defended = text.partition("## What is defended")[2].partition("\n## ")[0]
    for table in (defended, *((security.parent / link).read_text("utf-8") for link in cited)):
        assert f"| {HELD_BY} |" in table


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_a_document_has_no_broken_link(document: Path) -> None:
    assert broken_links(document.read_text("utf-8"), document) == []


def test_sources_name_only_documents_that_exist() -> None:
    named = {path for source in SOURCES for path in re.findall(r"docs/[\w./-]*\w", source.read_text("utf-8"))}
    # Short forms such as docs/decisions/0020 stand for the one page that begins so.
    assert [path for path in sorted(named) if not any(ROOT.glob(f"{path}*"))] == []


def test_the_architecture_page_has_the_sentence_of_the_layers() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text("utf-8")
    sentence = " ".join(_CODE_BLOCK.findall(text)[0].strip("`").split())
    assert sentence == " | ".join(" ".join(row) for row in LAYERS)


@pytest.mark.parametrize("room", [room for row in LAYERS for room in row] + [*APART])
def test_the_architecture_page_describes_every_room(room: str) -> None:
    kind = "/" if (ROOT / "ts_handlers" / room).is_dir() else ".py"
    assert f"**`{room}{kind}`**" in (ROOT / "docs" / "architecture.md").read_text("utf-8")


def test_the_architecture_page_lists_files_where_they_lie() -> None:
    room, missing = Path(), []
    for line in (ROOT / "docs" / "architecture.md").read_text("utf-8").splitlines():
        if title := re.match(r"\*\*`([\w/]+)/`\*\*", line):
            room = ROOT / "ts_handlers" / title[1]
        elif line.startswith("| `"):
            missing += [name for name in re.findall(r"`([^`]+)`", line.split("|")[1]) if not (room / name).exists()]
    assert missing == []


def test_every_decision_is_in_the_index() -> None:
    folder = ROOT / "docs" / "decisions"
    index = set(_LINK.findall((folder / "README.md").read_text("utf-8")))
    assert index == {path.name for path in folder.glob("0*.md")}


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("see `ts_handlers/store/nowhere.py`", ["ts_handlers/store/nowhere.py"]),
        ("run tests/store/nothing*.py.", ["tests/store/nothing*.py"]),
        ("`backends/nowhere.py` and `backends/base.py`", ["backends/nowhere.py"]),
        ("`nowhere_at_all.py`", ["nowhere_at_all.py"]),
        ("`torch/_dynamo/guards.py` and https://host/docs/x, tests/test_docs.py:3", []),
    ],
)
def test_a_seeded_path_is_found(text: str, found: list[str]) -> None:
    assert missing_paths(text, ROOT) == found


def test_a_seeded_name_is_found() -> None:
    assert missing_names("`ts_handlers.errors.NoError`, `ts_handlers.errors`, ts_handlers.drawer") == [
        "ts_handlers.errors.NoError",
        "ts_handlers.drawer",
    ]


def test_a_seeded_test_is_found() -> None:
    text = "`tests/test_docs.py::test_nothing`, `tests/test_docs.py::test_a_seeded_test_is_found`, tests/test_docs.py"
    assert missing_tests(text) == ["tests/test_docs.py::test_nothing"]


def test_a_seeded_promise_is_found() -> None:
    rows = {
        "a test": "`tests/test_docs.py::test_a_seeded_promise_is_found`",
        "a reason": "not tested: takes a power cut",
        "nothing": "",
        "words": "it is certain",
        "a gone file": "`tests/test_gone.py`",
        "one of two": "`tests/test_docs.py`, `tests/test_gone.py`",
    }
    table = "| promise | kept by | held by |\n|---|---|---|\n"
    table += "".join(f"| {name} | x | {cell} |\n" for name, cell in rows.items())
    assert unheld_promises(f"{table}\n| other | table |\n|---|---|\n| a | b |\n") == list(rows)[2:]


def test_a_seeded_link_is_found() -> None:
    text = "# One\n[a](gone.md) [b](#one) [c](#two) [d](architecture.md#the-rooms) [e](architecture.md#the-cellar)"
    assert broken_links(text, ROOT / "docs" / "x.md") == ["gone.md", "#two", "architecture.md#the-cellar"]

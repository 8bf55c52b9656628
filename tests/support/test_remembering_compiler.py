"""The compiler of the tests compiles as the real one does."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.support import remembering_compiler
from tests.support.remembering_compiler import USES_BEFORE_PRECOMPILING, first_includes, main, precompiled

_OTHERS = [each for each in os.environ["PATH"].split(os.pathsep) if remembering_compiler.PREFIX not in each]
COMPILER = shutil.which("g++", path=os.pathsep.join(_OTHERS)) or ""
pytestmark = [pytest.mark.compile, pytest.mark.skipif(not COMPILER, reason="no C++ compiler")]

SOURCE = """// A comment
#include <torch/table.h>

#include <torch/more.h>
// And one more
extern "C" int answer() {{ return table + more + {number}; }}
#include <torch/table.h>
"""


@pytest.fixture
def options(tmp_path: Path) -> list[str]:
    for name in ("table", "more"):
        header = tmp_path / "include/torch" / f"{name}.h"
        header.parent.mkdir(parents=True, exist_ok=True)
        header.write_text(f"#pragma once\nstatic const int {name} = 20;\n")
    return ["-O1", "-fPIC", f"-I{tmp_path / 'include'}"]


def write(folder: Path, number: int) -> str:
    path = folder / f"source{number}.cpp"
    path.write_text(SOURCE.format(number=number))
    return str(path)


def test_first_includes_end_at_the_first_other_line(tmp_path: Path) -> None:
    assert first_includes(write(tmp_path, 1)) == ["torch/table.h", "torch/more.h"]


def test_headers_are_precompiled_once_and_the_object_is_the_same(tmp_path: Path, options: list[str]) -> None:
    headers, target = str(tmp_path / "headers"), str(tmp_path / "x.o")
    for number in range(USES_BEFORE_PRECOMPILING + 1):
        source = write(tmp_path, number)
        found = precompiled(headers, COMPILER, [*options, "-c", source, "-o", target], source, target)
        assert bool(found) == (number >= USES_BEFORE_PRECOMPILING - 1)
    assert len(list(Path(headers).rglob("*.gch"))) == 1
    source = write(tmp_path, 0)
    objects = []
    for extra in ([], [*found, "-Winvalid-pch", "-Werror"]):
        subprocess.run([COMPILER, *extra, *options, "-c", source, "-o", target], check=True)
        objects.append(Path(target).read_bytes())
    assert objects[0] == objects[1]
    told = subprocess.run([COMPILER, *found, *options, "-H", "-c", source, "-o", target], check=True, stderr=-1)
    assert f"! {found[0][2:]}/torch/table.h.gch" in told.stderr.decode().splitlines()  # GCC's sign that it took it


def test_an_object_is_copied_where_source_and_options_are_equal(
    tmp_path: Path, options: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = []
    real = subprocess.run
    monkeypatch.setattr(remembering_compiler.subprocess, "run", lambda *a, **k: ran.append(a) or real(*a, **k))
    objects = tmp_path / "objects"
    objects.mkdir()
    for number in (1, 1, 2):
        target = tmp_path / f"{number}.o"
        assert main(str(objects), COMPILER, [*options, "-c", write(tmp_path, number), "-o", str(target)]) == 0
        assert target.stat().st_size > 0
    assert len(ran) == 2

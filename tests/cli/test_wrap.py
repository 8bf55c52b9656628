"""`wrap`: a handler file with the two lines, from the command line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ts_handlers.cli.exit_codes import ExitCode

Run = Callable[..., Any]
THEIRS = "from ts.torch_handler.base_handler import BaseHandler\n\n\nclass Theirs(BaseHandler):\n    pass\n"


def test_wrap_writes_the_file_and_says_how_to_archive_it(run: Run, tmp_path: Path) -> None:
    theirs = tmp_path / "theirs.py"
    theirs.write_text(THEIRS)
    result = run("wrap", theirs)
    written = tmp_path / "warm_theirs.py"
    assert result.code == ExitCode.OK
    assert f"--handler {written} --extra-files {theirs}" in result.out
    assert "class Handler(CompiledHandlerMixin, Theirs):" in written.read_text()
    result = run("wrap", theirs, tmp_path / "handler.py", "--json")
    assert result.json == {
        "written": str(tmp_path / "handler.py"),
        "class": "Theirs",
        "module": "theirs",
        "extra_file": str(theirs),
    }
    assert theirs.read_text() == THEIRS


def test_wrap_refuses_with_the_reason(run: Run, tmp_path: Path) -> None:
    theirs = tmp_path / "theirs.py"
    theirs.write_text(THEIRS + "\n\nclass More:\n    pass\n")
    result = run("wrap", theirs)
    assert result.code == ExitCode.USAGE
    assert "several classes (Theirs, More)" in result.err
    assert not (tmp_path / "warm_theirs.py").exists()
    assert run("wrap", theirs, "--class", "Theirs").code == ExitCode.OK

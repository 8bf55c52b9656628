"""A fork server that imports little, and scripts that run with it and without."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.costs import costs
from tests.support.subprocesses import environment
from ts_handlers.fork_server.start import ForkServer, write_stand_in

SCRIPT = "/fork_server_job.py"
MARK = "fork_server_mark"
"""A module that only the fork server has imported: a process that has it is a fork."""


class Place:
    """A fork server, the file that stands in the interpreter's place, and scripts to run."""

    def __init__(self, folder: Path, preload: list[str], modules: dict[str, str]) -> None:
        self.modules = folder / "modules"
        self.modules.mkdir()
        for name, text in {MARK: "", **modules}.items():
            (self.modules / f"{name}.py").write_text(textwrap.dedent(text))
        self.work = folder / "work"
        self.work.mkdir()
        self.variables = environment()
        self.variables["PYTHONPATH"] += f"{os.pathsep}{self.modules}"
        self.server = ForkServer([MARK, *preload], self.variables)
        assert self.server.wait_ready()
        self.stand_in = write_stand_in(self.server.socket, SCRIPT)

    def start(self, code: str, *arguments: object, forked: bool = True, **changes: str) -> subprocess.Popen[str]:
        """Start a script, by the stand-in or by the interpreter."""
        script = self.work / SCRIPT[1:]
        text = textwrap.dedent(code)
        if not script.exists() or script.read_text() != text:  # another process may be reading it
            script.write_text(text)
        command = [str(self.stand_in if forked else sys.executable), str(script), *map(str, arguments)]
        env = {**self.variables, **changes}
        pipe = subprocess.PIPE
        return subprocess.Popen(command, env=env, cwd=self.work, stdin=pipe, stdout=pipe, stderr=pipe, text=True)

    def run(self, code: str, *arguments: object, forked: bool = True, **changes: str) -> tuple[int, str, str]:
        """Exit code, output and errors of a script."""
        process = self.start(code, *arguments, forked=forked, **changes)
        out, err = process.communicate(timeout=120)
        return process.returncode, out, err

    def is_forked(self, **changes: str) -> tuple[bool, str]:
        """Whether a process comes from the fork server now, and what its client says on stderr."""
        code, out, err = self.run(f"import sys; print({MARK!r} in sys.modules)", **changes)
        assert code == 0, err
        return out == "True\n", err


MakePlace = Callable[..., Place]


@costs("processes")
def make_place(folder: Path, *preload: str, **modules: str) -> Place:
    """A `Place` whose fork server imports modules, with these texts if they are given."""
    return Place(folder, list(preload), modules)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """A fork server that does not change; the tests of a module share it."""
    made = make_place(tmp_path_factory.mktemp("place"))
    yield made
    made.server.close()


@pytest.fixture
def make(tmp_path: Path) -> Iterator[MakePlace]:
    """Makes a place of a test's own."""
    with contextlib.ExitStack() as stack:

        def make_one(*preload: str, **modules: str) -> Any:
            made = make_place(tmp_path, *preload, **modules)
            stack.callback(made.server.close)
            return made

        yield make_one

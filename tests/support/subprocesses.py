"""Python code in processes of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

SUPPORT = Path(__file__).parent
REPOSITORY = SUPPORT.parents[1]
_HIDDEN = ("TS_HANDLERS_CACHE", "XDG_CACHE_HOME", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")


def environment(**changes: str | None) -> dict[str, str]:
    """This process's environment with changes (None removes); modules of the tests and the package importable."""
    variables: dict[str, str | None] = {name: value for name, value in os.environ.items() if name not in _HIDDEN}
    variables["PYTHONPATH"] = os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])
    variables.update(changes)
    return {name: value for name, value in variables.items() if value is not None}


def start_python(code: str, *arguments: object, **env: str | None) -> subprocess.Popen[str]:
    """Start a process that runs `code` with `arguments` in ``sys.argv[1:]``."""
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(**env),
    )


def finish(process: subprocess.Popen[str], code: int = 0) -> str:
    """Wait for a process, check its exit code and return what it printed."""
    out, err = process.communicate(timeout=300)
    assert process.returncode == code, f"exit code {process.returncode}, expected {code}\n{out}\n{err}"
    return out


def run_python(code: str, *arguments: object, **env: str | None) -> str:
    """Run `code` in a process of its own and return what it printed."""
    return finish(start_python(code, *arguments, **env))


def open_to_others(folder: Path) -> None:
    """Let other users pass through pytest's temporary folders to this one."""
    top = Path(tempfile.gettempdir()).resolve()
    for each in (folder, *folder.parents):
        if each == top or each.parent == each:
            return
        if each.stat().st_uid == os.geteuid():
            each.chmod(0o755)

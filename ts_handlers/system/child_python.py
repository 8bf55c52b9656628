"""The command by which this package starts its child processes."""

from __future__ import annotations

import sys


def run_module(name: str) -> list[str]:
    """Run `main` of a module in another Python, which looks for modules where ``PYTHONPATH`` says and nowhere before.

    ``-m`` and ``-c`` look in the working directory first, where files may lie that have a module's name; ``-P``, which
    leaves that out, came with Python 3.11.

    Examples
    --------
    >>> import subprocess
    >>> subprocess.run(run_module("this_module_is_nowhere"), capture_output=True, cwd="/").returncode
    1
    """
    code = f"import sys; sys.path[0] or sys.path.pop(0); from {name} import main; sys.exit(main())"
    return [sys.executable, "-c", code]

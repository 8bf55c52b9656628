"""The process that builds, as a command."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytestmark = pytest.mark.processes


def test_build_process_is_a_module_of_the_package() -> None:
    """Without a specification it ends with an error instead of waiting."""
    command = [sys.executable, "-m", "ts_handlers.startup.build_child"]
    result = subprocess.run(command, input="", capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode != 0
    assert result.stdout == ""

"""The command as a whole: exit codes, errors without tracebacks, what is missing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.subprocesses import finish, start_python
from ts_handlers.cli.exit_codes import ExitCode
from ts_handlers.store.local import store as local

MAIN = "from ts_handlers.cli.app import main; main()"
Run = Callable[..., Any]


def test_every_verb_has_help_the_store_option_and_json(run: Run) -> None:
    from ts_handlers.cli.app import make_app

    names = [command.name for command in make_app().registered_commands]
    assert {"ls", "show"} <= set(names)
    for name in names:
        result = run(name, "--help")
        assert result.code == 0
        assert name == "serve" or "--json" in result.out, name
        assert name in ("fork-server", "keygen", "serve", "wrap") or "--store" in result.out, name


def test_missing_store_and_wrong_arguments_have_codes_of_their_own(run: Run, tmp_path: Path) -> None:
    missing = run("ls", "--store", tmp_path / "nothing")
    assert missing.code == ExitCode.STORE
    assert "there is no store at" in missing.err
    assert "Traceback" not in missing.err
    assert not (tmp_path / "nothing").exists()
    assert run("ls", "--surprise").code == ExitCode.USAGE
    assert run("show").code == ExitCode.USAGE


def test_unsafe_store_is_refused_with_the_remedy(run: Run, filled: Path) -> None:
    filled.chmod(0o777)
    result = run("ls", "--store", filled)
    assert (result.code, result.out) == (ExitCode.STORE, "")
    assert "chmod go-w" in result.err


def test_bug_shows_its_traceback_and_is_no_finding(run: Run, filled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(local.LocalStore, "__init__", fail)
    result = run("ls", "--store", filled)
    assert result.code == ExitCode.BUG
    assert "ZeroDivisionError: a bug" in result.err


@pytest.mark.processes
def test_command_without_typer_says_what_to_install() -> None:
    process = start_python(f"import sys; sys.modules['typer'] = None\n{MAIN}")
    assert process.stderr is not None
    error = process.stderr.read()
    finish(process, ExitCode.USAGE)
    assert error == "the command ts-handlers needs the packages typer and rich: pip install 'ts-handlers[cli]'\n"


@pytest.mark.processes
def test_help_and_listing_import_no_torch(filled: Path) -> None:
    code = f"""
        import atexit, sys
        atexit.register(lambda: print('torch' in sys.modules, file=sys.stderr))
        {MAIN}
    """
    for arguments in (["--help"], ["ls", "--store", filled], ["--version"]):
        process = start_python(code, *arguments, fresh=True)
        _, error = process.communicate(timeout=300)
        assert (process.returncode, error) == (0, "False\n")

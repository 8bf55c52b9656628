"""Entry point of `ts-handlers`: finds the verbs and turns exceptions into messages and exit codes."""

from __future__ import annotations

import functools
import importlib
import logging
import pkgutil
import sys
import traceback
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NoReturn

from ts_handlers.cli.exit_codes import ExitCode, exit_code_of
from ts_handlers.cli.output import PrintableFormatter, say
from ts_handlers.errors import WarmStartError

if TYPE_CHECKING:
    import typer

NEEDS = "the command ts-handlers needs the packages typer and rich: pip install 'ts-handlers[cli]'"


def main() -> None:
    """Run the command `ts-handlers`: the entry point of the console script."""
    if sys.argv[1:2] == ["serve"]:
        _serve()
    try:
        app = make_app()
    except ModuleNotFoundError as error:
        if error.name not in ("typer", "rich"):
            raise
        print(NEEDS, file=sys.stderr)
        raise SystemExit(ExitCode.USAGE) from None
    if logging.lastResort is not None:  # warnings of the package
        logging.lastResort.setFormatter(PrintableFormatter("%(message)s"))
    app(prog_name="ts-handlers")


def make_app() -> typer.Typer:
    """The application with every verb of `ts_handlers.cli.verbs`."""
    import rich as rich  # asked for here, so that a missing one is said before any verb runs
    import typer

    from ts_handlers.cli import verbs
    from ts_handlers.cli.option_groups import expand

    app = typer.Typer(
        name="ts-handlers",
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        help="Look at and look after a store of compiled models.",
        epilog="Exit codes: " + ", ".join(f"{code.value} {code.name.lower()}" for code in ExitCode),
    )

    @app.callback()
    def global_options(
        version: bool = typer.Option(
            False, "--version", callback=_print_version, is_eager=True, help="Print the version and exit."
        ),
    ) -> None:
        pass

    for info in sorted(pkgutil.iter_modules(verbs.__path__), key=lambda info: info.name):
        module = importlib.import_module(f"{verbs.__name__}.{info.name}")
        name = info.name.strip("_").replace("_", "-")  # `import_.py`, since `import` is a keyword
        app.command(name, context_settings=getattr(module, "CONTEXT", None))(_with_exit_codes(expand(module.command)))
    return app


def _serve() -> NoReturn:
    """Run the verb `serve` without the others, whose imports a server would wait for."""
    from ts_handlers.servers.torchserve.launch import main

    try:
        raise SystemExit(main(sys.argv[2:]))
    except WarmStartError as error:
        say(f"ts-handlers: {error}", file=sys.stderr)
        raise SystemExit(exit_code_of(error)) from None


def _print_version(wanted: bool) -> None:
    if wanted:
        import typer

        from ts_handlers.version import __version__

        print(__version__)
        raise typer.Exit


def _with_exit_codes(command: Callable[..., ExitCode | None]) -> Callable[..., None]:
    """The same command; what it returns, or the exception that it raises, becomes the process's exit code."""
    import typer

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            code = command(*args, **kwargs) or ExitCode.OK
            sys.stdout.flush()
        except BrokenPipeError:
            raise  # the reader of a pipe has gone away; typer ends the process quietly
        except KeyboardInterrupt:
            code = ExitCode.INTERRUPTED
        except Exception as error:
            if type(error).__module__.partition(".")[0] in ("typer", "click"):
                raise  # a wrong argument, or an exit that was asked for
            code = exit_code_of(error)
            if code is ExitCode.BUG:
                say(traceback.format_exc().rstrip(), file=sys.stderr)
            else:
                say(f"ts-handlers: {error}", file=sys.stderr)
        raise typer.Exit(int(code))

    return run

"""`ts-handlers fork-server`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from ts_handlers.cli.exit_codes import ExitCode
from ts_handlers.cli.options import JsonOption
from ts_handlers.cli.output import print_json, say


def command(
    socket: Annotated[Path, typer.Argument(metavar="SOCKET", help="In a folder of this user with mode 0700.")],
    preload: Annotated[
        list[str], typer.Option(metavar="MODULE,...", help="What the archives' handlers import; may be repeated.")
    ] = [],  # noqa: B006
    config: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="TorchServe's config.properties, which sets variables of workers."),
    ] = None,
    status: Annotated[bool, typer.Option("--status", help="Say what the one that runs there has imported.")] = False,
    as_json: JsonOption = False,
) -> ExitCode:
    """Run a fork server that stays while TorchServe is started again, until it is ended by SIGTERM.

    `ts-handlers serve --fork-server-socket SOCKET` uses it.
    """
    from ts_handlers.fork_server.server import Options, command_line
    from ts_handlers.fork_server.start import facts_of
    from ts_handlers.servers.torchserve.launch import read_properties
    from ts_handlers.servers.torchserve.workers import environment_of_workers, preloaded_modules

    if not status:
        declared = [name.strip() for each in preload for name in each.split(",") if name.strip()]
        arguments = command_line(Options(str(socket.absolute()), preloaded_modules(declared)))
        os.execve(arguments[0], arguments, environment_of_workers(os.environ, read_properties(config)))
    return _print_status(facts_of(socket), as_json)


def _print_status(facts: dict[str, Any], as_json: bool) -> ExitCode:
    if as_json:
        print_json(facts)
    else:
        say(f"process {facts['pid']} has imported {', '.join(facts['modules'])}")
        for name, reason in facts["failed"].items():
            say(f"left out is {name}: {reason}")
    return ExitCode.FINDINGS if facts["failed"] or facts["changed"] else ExitCode.OK

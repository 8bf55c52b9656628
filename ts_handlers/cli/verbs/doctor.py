"""`ts-handlers doctor`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ts_handlers.cli.exit_codes import ExitCode
from ts_handlers.cli.options import JsonOption, StoreOption
from ts_handlers.cli.output import print_json, print_table


def command(
    config: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A model-config.yaml to check against the recorded builds.")
    ] = None,
    model: Annotated[str | None, typer.Option(metavar="NAME", help="The model's name in the store.")] = None,
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> ExitCode:
    """Look for what this machine lacks to build and serve compiled models, and say what to do.

    Ends with 1 when something works with a restriction, with 4 when something will not work.
    """
    from ts_handlers.doctor import diagnose, exit_code, report

    findings = diagnose(store, config, model)
    if as_json:
        print_json(report(findings))
    else:
        print_table(
            ("check", "", "found", "remedy"),
            [(finding.check, finding.status, finding.found, finding.remedy) for finding in findings],
        )
    return ExitCode(exit_code(findings))

"""`ts-handlers verify`."""

from __future__ import annotations

from typing import Annotated

import typer

from ts_handlers.cli.exit_codes import ExitCode
from ts_handlers.cli.options import JsonOption, StoreOptions
from ts_handlers.cli.output import human_bytes, print_json, print_table, say


def command(
    *,
    repair: Annotated[bool, typer.Option("--repair", help="Move what is damaged into the store's trash.")] = False,
    store: StoreOptions,
    as_json: JsonOption = False,
) -> ExitCode:
    """Hash every file of every entry and every canary, whatever was remembered about them.

    Run it from time to time: starts hash unchanged files only once a week. Ends with 1 when something is damaged,
    repaired or not. A damaged entry that a living process reads stays until that process has ended; quarantines stay.
    """
    from ts_handlers.store.upkeep.audit import audit

    opened = store.open()
    findings = list(audit(opened.root, repair=repair))
    damaged = [finding for finding in findings if finding.problem is not None]
    total = sum(finding.bytes for finding in findings)
    if as_json:
        rows = [
            {
                "kind": finding.kind,
                "path": str(finding.path),
                "key": finding.key,
                "model": finding.model,
                "problem": finding.problem,
                "action": finding.action,
            }
            for finding in damaged
        ]
        print_json({"store": str(opened.root), "checked": len(findings), "bytes": total, "damaged": rows})
    else:
        if damaged:
            print_table(
                ("", "path", "problem", "action"),
                [(f.kind, f.path.relative_to(opened.root), f.problem, f.action or "--repair") for f in damaged],
            )
        say(f"{len(findings)} checked, {human_bytes(total)}, {len(damaged)} damaged in {opened.root}")
    return ExitCode.FINDINGS if damaged else ExitCode.OK

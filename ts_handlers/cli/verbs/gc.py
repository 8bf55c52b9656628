"""`ts-handlers gc`."""

from __future__ import annotations

from typing import Annotated

import typer

from ts_handlers.cli.exit_codes import ExitCode
from ts_handlers.cli.options import JsonOption, StoreOptions
from ts_handlers.cli.output import human_bytes, print_json, print_table, say
from ts_handlers.settings.quantities import parse_bytes


def command(
    *,
    max_bytes: Annotated[str | None, typer.Option(metavar="SIZE", help="Quota of the store, such as 20GiB.")] = None,
    max_entries: Annotated[int | None, typer.Option(min=0, help="Quota of the store.")] = None,
    max_inodes: Annotated[int | None, typer.Option(min=0, help="Quota of the store.")] = None,
    model_max_bytes: Annotated[str | None, typer.Option(metavar="SIZE", help="Quota of each model.")] = None,
    model_max_entries: Annotated[int | None, typer.Option(min=0, help="Quota of each model.")] = None,
    model_max_inodes: Annotated[int | None, typer.Option(min=0, help="Quota of each model.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would go; remove nothing.")] = False,
    store: StoreOptions,
    as_json: JsonOption = False,
) -> ExitCode:
    """Collect what crashes have left and, with a quota, evict the entries least recently used.

    Pinned entries and entries that a living process reads stay. Ends with 1 when a quota stays exceeded.
    """
    from ts_handlers.store.upkeep.eviction import Quotas
    from ts_handlers.store.upkeep.space import make_room

    quotas = Quotas(_size("--max-bytes", max_bytes), max_entries, max_inodes)
    per_model = Quotas(_size("--model-max-bytes", model_max_bytes), model_max_entries, model_max_inodes)
    opened = store.open()
    report = make_room(opened.root, quotas, per_model, dry_run=dry_run)
    if as_json:
        steps = [
            {
                "kind": step.kind,
                "path": str(step.path),
                "model": step.model,
                "key": step.key,
                "bytes": step.bytes,
                "inodes": step.inodes,
                "reason": step.reason,
                "stays": step.refusal,
            }
            for step in report.steps
        ]
        print_json({"dry_run": dry_run, "steps": steps, "freed_bytes": report.freed_bytes, "unmet": report.unmet})
    else:
        print_table(
            ("", "path", ">size", "reason", "stays"),
            (
                (step.kind, step.path.relative_to(opened.root), human_bytes(step.bytes), step.reason, step.refusal)
                for step in report.steps
            ),
        )
        verb = "would be freed" if dry_run else "freed"
        say(f"{len(report.done)} removals, {human_bytes(report.freed_bytes)} {verb} in {opened.root}")
        for text in report.unmet:
            say(text)
    stayed = any(step.kind == "garbage" and step.refusal is not None for step in report.steps)
    return ExitCode.FINDINGS if report.unmet or stayed else ExitCode.OK


def _size(option: str, text: str | None) -> int | None:
    try:
        return None if text is None else parse_bytes(text)
    except ValueError as error:
        raise typer.BadParameter(f"{option}: {error}") from error

"""`ts-handlers export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ts_handlers.cli.exit_codes import ExitCode
from ts_handlers.cli.options import JsonOption, StoreOptions
from ts_handlers.cli.remote_options import EntryFilter, SigningKey, open_keyring, report


def command(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="New file.")],
    wanted: EntryFilter,
    *,
    signing_key: SigningKey = None,
    store: StoreOptions,
    as_json: JsonOption = False,
) -> ExitCode:
    """Write entries, with their canary records, into one file."""
    from ts_handlers.store.bundles import export_bundle

    opened = store.open()
    entries = wanted.select(opened)
    if not entries:
        raise typer.BadParameter(f"no entry of {opened.root} fits; `ts-handlers ls` lists them")
    return report(export_bundle(opened, entries, bundle, open_keyring([], signing_key)), as_json)

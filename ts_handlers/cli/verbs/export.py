"""`ts-handlers export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ts_handlers.cli.exit_codes import ExitCode
from ts_handlers.cli.options import JsonOption, StoreOption, TrustedFolders, open_existing_store
from ts_handlers.cli.remote_options import KeyOption, ModelOption, SigningKey, open_trust, report, select


def command(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="New file.")],
    model: ModelOption = None,
    key: KeyOption = [],  # noqa: B006  (typer copies it)
    signing_key: SigningKey = None,
    trust_folder: TrustedFolders = [],  # noqa: B006
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> ExitCode:
    """Write entries, with their canary records, into one file."""
    from ts_handlers.store.bundles import export_bundle
    from ts_handlers.store.upkeep.scan import scan_entries

    opened = open_existing_store(store, trust_folder)
    entries = select(scan_entries(opened.root), model, key)
    if not entries:
        raise typer.BadParameter(f"no entry of {opened.root} fits; `ts-handlers ls` lists them")
    return report(export_bundle(opened, entries, bundle, open_trust([], signing_key)), as_json)

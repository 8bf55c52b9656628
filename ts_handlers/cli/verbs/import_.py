"""`ts-handlers import`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ts_handlers.cli.exit_codes import ExitCode
from ts_handlers.cli.options import JsonOption, StoreOptions
from ts_handlers.cli.remote_options import PublicKeys, open_keyring, report


def command(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="A file that `export` has written.")],
    *,
    public_key: PublicKeys = [],  # noqa: B006  (typer copies it)
    store: StoreOptions,
    as_json: JsonOption = False,
) -> ExitCode:
    """Publish the entries of a bundle in the local store, which is made if it does not exist."""
    from ts_handlers.store.bundles import import_bundle

    return report(import_bundle(store.make(), bundle, open_keyring(public_key)), as_json)

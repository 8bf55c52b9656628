"""`ts-handlers import`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ts_handlers.cli.exit_codes import ExitCode
from ts_handlers.cli.options import JsonOption, StoreOption, TrustedFolders
from ts_handlers.cli.remote_options import PublicKeys, make_store, open_trust, report


def command(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="A file that `export` has written.")],
    public_key: PublicKeys = [],  # noqa: B006  (typer copies it)
    trust_folder: TrustedFolders = [],  # noqa: B006
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> ExitCode:
    """Publish the entries of a bundle in the local store, which is made if it does not exist."""
    from ts_handlers.store.bundles import import_bundle

    opened = make_store(store, trust_folder)
    return report(import_bundle(opened, bundle, open_trust(public_key)), as_json)

"""`ts-handlers import`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ts_handlers.cli.exit_codes import ExitCode
from ts_handlers.cli.options import JsonOption, StoreOption
from ts_handlers.cli.remote_options import PublicKeys, open_trust, report
from ts_handlers.settings.location import default_store_root


def command(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="A file that `export` has written.")],
    public_key: PublicKeys = [],  # noqa: B006  (typer copies it)
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> ExitCode:
    """Publish the entries of a bundle in the local store, which is made if it does not exist."""
    from ts_handlers.store.bundles import import_bundle
    from ts_handlers.store.local import LocalStore

    opened = LocalStore(Path(store or default_store_root()))
    return report(import_bundle(opened, bundle, open_trust(public_key)), as_json)

"""`ts-handlers pin`."""

from __future__ import annotations

from typing import Annotated

import typer

from ts_handlers.cli.options import (
    JsonOption,
    KeyArgument,
    StoreOption,
    TrustedFolders,
    find_entries,
    open_existing_store,
)
from ts_handlers.cli.output import print_json


def command(
    key: KeyArgument,
    note: Annotated[str, typer.Option(help="Why; shown by `unpin`.")] = "",
    trust_folder: TrustedFolders = [],  # noqa: B006  (typer copies it)
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Keep an entry from being evicted."""
    from ts_handlers.store.local.pins import pin

    opened = open_existing_store(store, trust_folder)
    entry = find_entries(opened, key)[0]
    pin(opened.root, entry.key, note)
    if as_json:
        print_json({"key": entry.key, "pinned": True, "note": note})
    else:
        print(f"{entry.key} of {entry.model} is pinned")

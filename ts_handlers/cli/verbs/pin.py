"""`ts-handlers pin`."""

from __future__ import annotations

from typing import Annotated

import typer

from ts_handlers.cli.options import JsonOption, KeyArgument, StoreOptions, find_entries
from ts_handlers.cli.output import print_json, say


def command(
    key: KeyArgument,
    *,
    note: Annotated[str, typer.Option(help="Why; shown by `unpin`.")] = "",
    store: StoreOptions,
    as_json: JsonOption = False,
) -> None:
    """Keep an entry from being evicted."""
    from ts_handlers.store.local.pins import pin

    opened = store.open()
    entry = find_entries(opened, key)[0]
    pin(opened.root, entry.key, note)
    if as_json:
        print_json({"key": entry.key, "pinned": True, "note": note})
    else:
        say(f"{entry.key} of {entry.model} is pinned")

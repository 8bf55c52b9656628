"""`ts-handlers unpin`."""

from __future__ import annotations

import typer

from ts_handlers.cli.options import JsonOption, KeyArgument, StoreOption, TrustedFolders, open_existing_store
from ts_handlers.cli.output import print_json


def command(
    key: KeyArgument,
    trust_folder: TrustedFolders = [],  # noqa: B006  (typer copies it)
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Let a pinned entry be evicted again when room is needed."""
    from ts_handlers.store.local.pins import pinned_keys, unpin

    opened = open_existing_store(store, trust_folder)
    pins = {name: note for name, note in pinned_keys(opened.root).items() if name.startswith(key.lower())}
    if len(pins) != 1:
        raise typer.BadParameter(f"{len(pins)} pinned keys start with {key!r}: {', '.join(pins) or 'none'}")
    ((name, note),) = pins.items()
    unpin(opened.root, name)
    if as_json:
        print_json({"key": name, "pinned": False, "note": note})
    else:
        print(f"{name} is not pinned any more" + (f" (its note was: {note})" if note else ""))

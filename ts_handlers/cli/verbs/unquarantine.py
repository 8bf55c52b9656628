"""`ts-handlers unquarantine`."""

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
    """Let what is quarantined under a key, or has failed to build, be tried again by the next start."""
    from ts_handlers.guard.quarantine import lift_quarantine, read_quarantines
    from ts_handlers.guard.records import stored_fields

    root = open_existing_store(store, trust_folder).root
    keys = sorted({record.key for record in read_quarantines(root, key.lower())})
    if len(keys) != 1:
        found = f"{len(keys)} quarantined keys start with {key!r}: {', '.join(keys[:8])}; give more digits"
        raise typer.BadParameter(found if keys else f"no quarantined key in {root} starts with {key!r}")
    lifted = lift_quarantine(root, keys[0])
    if as_json:
        print_json([stored_fields(record) for record in lifted])
    else:
        for record in lifted:
            print(f"{record.key} of {record.model} is tried again; was: {record.reason}")

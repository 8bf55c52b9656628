"""`ts-handlers unquarantine`."""

from __future__ import annotations

from ts_handlers.cli.options import JsonOption, KeyArgument, StoreOptions, one_key
from ts_handlers.cli.output import print_json, say


def command(key: KeyArgument, store: StoreOptions, *, as_json: JsonOption = False) -> None:
    """Let what is quarantined under a key, or has failed to build, be tried again by the next start."""
    from ts_handlers.guard.quarantine import lift_quarantine, read_quarantines
    from ts_handlers.guard.records import stored_fields

    root = store.open().root
    keys = (record.key for record in read_quarantines(root, key.lower()))
    name = one_key(keys, key, f"no quarantined key in {root} starts with {key!r}", "quarantined keys")
    lifted = lift_quarantine(root, name)
    if as_json:
        print_json([stored_fields(record) for record in lifted])
    else:
        for record in lifted:
            say(f"{record.key} of {record.model} is tried again; was: {record.reason}")

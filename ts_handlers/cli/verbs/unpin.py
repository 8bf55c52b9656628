"""`ts-handlers unpin`."""

from __future__ import annotations

from ts_handlers.cli.options import JsonOption, KeyArgument, StoreOptions, one_key
from ts_handlers.cli.output import print_json, say


def command(key: KeyArgument, store: StoreOptions, *, as_json: JsonOption = False) -> None:
    """Let a pinned entry be evicted again when room is needed."""
    from ts_handlers.store.local.pins import pinned_keys, unpin

    root = store.open().root
    pins = pinned_keys(root)
    name = one_key(pins, key, f"0 pinned keys start with {key!r}: none", "pinned keys")
    note = pins[name]
    unpin(root, name)
    if as_json:
        print_json({"key": name, "pinned": False, "note": note})
    else:
        say(f"{name} is not pinned any more" + (f" (its note was: {note})" if note else ""))

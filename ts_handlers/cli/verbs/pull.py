"""`ts-handlers pull`."""

from __future__ import annotations

from ts_handlers.cli.exit_codes import ExitCode
from ts_handlers.cli.options import JsonOption, StoreOptions
from ts_handlers.cli.remote_options import EntryFilter, PublicKeys, RemoteOptions, open_keyring, report


def command(
    remote: RemoteOptions,
    wanted: EntryFilter,
    *,
    public_key: PublicKeys = [],  # noqa: B006  (typer copies it)
    store: StoreOptions,
    as_json: JsonOption = False,
) -> ExitCode:
    """Fetch entries, with their canary records, from a remote store; the local store is made if it does not exist."""
    from ts_handlers.store.bundles import pull

    opened = store.make()
    return report(pull(opened, remote.open(), open_keyring(public_key), wanted.accepts), as_json)

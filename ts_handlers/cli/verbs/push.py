"""`ts-handlers push`."""

from __future__ import annotations

from ts_handlers.cli.exit_codes import ExitCode
from ts_handlers.cli.options import JsonOption, StoreOptions
from ts_handlers.cli.remote_options import EntryFilter, PublicKeys, RemoteOptions, SigningKey, open_keyring, report


def command(
    remote: RemoteOptions,
    wanted: EntryFilter,
    *,
    signing_key: SigningKey = None,
    public_key: PublicKeys = [],  # noqa: B006  (typer copies it)
    store: StoreOptions,
    as_json: JsonOption = False,
) -> ExitCode:
    """Send entries of the store, with their canary records, to a remote store; what is there stays."""
    from ts_handlers.store.bundles import push

    opened = store.open()
    entries = wanted.select(opened)
    return report(push(opened, entries, remote.open(), open_keyring(public_key, signing_key)), as_json)

"""`ts-handlers push`."""

from __future__ import annotations

from ts_handlers.cli.exit_codes import ExitCode
from ts_handlers.cli.options import JsonOption, StoreOption, TrustedFolders, open_existing_store
from ts_handlers.cli.remote_options import (
    Client,
    ClientOption,
    KeyOption,
    ModelOption,
    PublicKeys,
    RemoteArgument,
    SigningKey,
    StorageOption,
    TimeoutOption,
    open_remote,
    open_trust,
    report,
    select,
)


def command(
    url: RemoteArgument,
    model: ModelOption = None,
    key: KeyOption = [],  # noqa: B006  (typer copies it)
    option: StorageOption = [],  # noqa: B006
    signing_key: SigningKey = None,
    public_key: PublicKeys = [],  # noqa: B006
    timeout: TimeoutOption = 120.0,
    client: ClientOption = Client.AUTO,
    trust_folder: TrustedFolders = [],  # noqa: B006
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> ExitCode:
    """Send entries of the store, with their canary records, to a remote store; what is there stays."""
    from ts_handlers.store.bundles import push
    from ts_handlers.store.upkeep.scan import scan_entries

    opened = open_existing_store(store, trust_folder)
    entries = select(scan_entries(opened.root), model, key)
    remote = open_remote(url, option, timeout, client)
    return report(push(opened, entries, remote, open_trust(public_key, signing_key)), as_json)

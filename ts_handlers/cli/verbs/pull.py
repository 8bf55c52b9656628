"""`ts-handlers pull`."""

from __future__ import annotations

from ts_handlers.cli.exit_codes import ExitCode
from ts_handlers.cli.options import JsonOption, StoreOption, TrustedFolders
from ts_handlers.cli.remote_options import (
    Client,
    ClientOption,
    KeyOption,
    ModelOption,
    PublicKeys,
    RemoteArgument,
    StorageOption,
    TimeoutOption,
    is_wanted,
    make_store,
    open_remote,
    open_trust,
    report,
)


def command(
    url: RemoteArgument,
    model: ModelOption = None,
    key: KeyOption = [],  # noqa: B006  (typer copies it)
    option: StorageOption = [],  # noqa: B006
    public_key: PublicKeys = [],  # noqa: B006
    timeout: TimeoutOption = 120.0,
    client: ClientOption = Client.AUTO,
    trust_folder: TrustedFolders = [],  # noqa: B006
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> ExitCode:
    """Fetch entries, with their canary records, from a remote store; the local store is made if it does not exist."""
    from ts_handlers.store.bundles import pull

    opened = make_store(store, trust_folder)
    remote = open_remote(url, option, timeout, client)
    return report(pull(opened, remote, open_trust(public_key), lambda name: is_wanted(model, key, name)), as_json)

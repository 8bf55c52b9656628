"""`ts-handlers pull`."""

from __future__ import annotations

from pathlib import Path

from ts_handlers.cli.exit_codes import ExitCode
from ts_handlers.cli.options import JsonOption, StoreOption
from ts_handlers.cli.remote_options import (
    KeyOption,
    ModelOption,
    PublicKeys,
    RemoteArgument,
    StorageOption,
    TimeoutOption,
    is_wanted,
    open_remote,
    open_trust,
    report,
)
from ts_handlers.settings.location import default_store_root


def command(
    url: RemoteArgument,
    model: ModelOption = None,
    key: KeyOption = [],  # noqa: B006  (typer copies it)
    option: StorageOption = [],  # noqa: B006
    public_key: PublicKeys = [],  # noqa: B006
    timeout: TimeoutOption = 120.0,
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> ExitCode:
    """Fetch entries, with their canary records, from a remote store; the local store is made if it does not exist."""
    from ts_handlers.store.bundles import pull
    from ts_handlers.store.local import LocalStore

    opened = LocalStore(Path(store or default_store_root()))
    remote = open_remote(url, option, timeout)
    return report(pull(opened, remote, open_trust(public_key), lambda name: is_wanted(model, key, name)), as_json)

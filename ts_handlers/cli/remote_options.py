"""Options of the verbs that move entries between hosts."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ts_handlers.cli.exit_codes import ExitCode
from ts_handlers.cli.options import absolute
from ts_handlers.cli.output import print_json, print_table
from ts_handlers.settings.location import default_store_root

if TYPE_CHECKING:
    from collections.abc import Iterable

    from ts_handlers.store.bundles import Moved
    from ts_handlers.store.local.store import LocalStore
    from ts_handlers.store.remote.base import Remote
    from ts_handlers.store.remote.signing import Keyring
    from ts_handlers.store.upkeep.scan import EntryInfo


class Client(str, Enum):
    """The values of the setting ``remote.client``."""

    AUTO = "auto"
    OBSTORE = "obstore"
    FSSPEC = "fsspec"


RemoteArgument = Annotated[
    str, typer.Argument(metavar="URL", help="Of the remote store, such as s3://bucket/prefix or file:///mnt/artifacts.")
]
StorageOption = Annotated[
    list[str],
    typer.Option(
        "--option",
        metavar="NAME=VALUE",
        help="A storage option of fsspec, such as endpoint_url=...; leave credentials to the environment.",
    ),
]
ClientOption = Annotated[
    Client, typer.Option("--client", help="The library that reaches S3, GCS and Azure, see docs/remote.md.")
]
TimeoutOption = Annotated[float, typer.Option("--timeout", metavar="SECONDS", help="For each object.")]
PublicKeys = Annotated[
    list[Path],
    typer.Option("--public-key", metavar="PEM", help="Accept only what this key has signed; may be given repeatedly."),
]
SigningKey = Annotated[Path | None, typer.Option("--signing-key", metavar="PEM", help="Sign with this private key.")]
ModelOption = Annotated[str | None, typer.Option("--model", metavar="NAME", help="Only entries of this model.")]
KeyOption = Annotated[list[str], typer.Option("--key", metavar="KEY", help="Only keys that start so.")]


def open_remote(url: str, options: list[str], timeout: float, client: Client) -> Remote:
    """The remote store that the options name; its failures are not remembered for the workers of this host."""
    from ts_handlers.settings import Settings
    from ts_handlers.settings.sections import RemoteSettings
    from ts_handlers.settings.validation import validate
    from ts_handlers.store.remote.objects import RemoteObjects

    pairs = {}
    for option in options:
        name, separator, value = option.partition("=")
        if not separator:
            raise typer.BadParameter(f"--option: expected NAME=VALUE, found {name!r}")
        pairs[name] = value
    settings = RemoteSettings(url, timeout_seconds=timeout, options=pairs, client=client.value)
    validate(Settings(remote=settings))
    return RemoteObjects(settings, None)


def make_store(path: Path | None, trusted_folders: list[Path]) -> LocalStore:
    """The store that `path` names (None: the default one), made if it does not exist."""
    from ts_handlers.store.local.store import LocalStore

    return LocalStore(Path(path or default_store_root()), absolute(trusted_folders))


def open_trust(public_keys: list[Path], signing_key: Path | None = None) -> Keyring:
    """The keys that the options name."""
    from ts_handlers.settings.sections import TrustSettings
    from ts_handlers.store.remote.signing import load_keyring

    return load_keyring(TrustSettings(tuple(map(str, public_keys)), None if signing_key is None else str(signing_key)))


def is_wanted(model: str | None, keys: list[str], subject: str) -> bool:
    """Whether an address is of the model and of one of the keys that the options name."""
    parts = subject.split("/")
    return model in (None, parts[0]) and (not keys or any(parts[-1].startswith(key.lower()) for key in keys))


def select(entries: Iterable[EntryInfo], model: str | None, keys: list[str]) -> list[EntryInfo]:
    """The entries that the options name."""
    return [entry for entry in entries if is_wanted(model, keys, f"{entry.model}/{entry.key}")]


def report(moved: Iterable[Moved], as_json: bool) -> ExitCode:
    """Print what became of each entry; findings when one was refused or failed."""
    rows = list(moved)
    if as_json:
        print_json(
            [
                {"entry": row.subject, "outcome": row.outcome, "canaries": row.canaries, "reason": row.reason or None}
                for row in rows
            ]
        )
    else:
        print_table(
            ("entry", "outcome", ">canaries", "reason"),
            ((row.subject, row.outcome, row.canaries, row.reason) for row in rows),
        )
    return ExitCode.FINDINGS if any(row.outcome in ("refused", "failed") for row in rows) else ExitCode.OK

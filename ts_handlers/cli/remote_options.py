"""Options and output that the verbs share which move entries between hosts: push, pull, export and import."""

from __future__ import annotations

import dataclasses
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ts_handlers.cli.exit_codes import ExitCode
from ts_handlers.cli.option_groups import OptionGroup
from ts_handlers.cli.output import print_json, print_table

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


PublicKeys = Annotated[
    list[Path],
    typer.Option("--public-key", metavar="PEM", help="Accept only what this key has signed; may be given repeatedly."),
]
SigningKey = Annotated[Path | None, typer.Option("--signing-key", metavar="PEM", help="Sign with this private key.")]


@dataclasses.dataclass(frozen=True)
class RemoteOptions(OptionGroup):
    """Which remote store, and how it is reached."""

    url: Annotated[
        str,
        typer.Argument(metavar="URL", help="Of the remote store, such as s3://bucket/prefix or file:///mnt/artifacts."),
    ]
    option: Annotated[
        list[str],
        typer.Option(
            "--option",
            metavar="NAME=VALUE",
            help="A storage option of fsspec, such as endpoint_url=...; leave credentials to the environment.",
        ),
    ] = dataclasses.field(default_factory=list)
    timeout: Annotated[float, typer.Option("--timeout", metavar="SECONDS", help="For each object.")] = 120.0
    client: Annotated[
        Client, typer.Option("--client", help="The library that reaches S3, GCS and Azure, see docs/remote.md.")
    ] = Client.AUTO

    def open(self) -> Remote:
        """The remote store; its failures are not remembered for the workers of this host.

        Raises
        ------
        typer.BadParameter, SettingsError
            An option cannot be used.
        """
        from ts_handlers.settings import Settings
        from ts_handlers.settings.sections import RemoteSettings
        from ts_handlers.settings.validation import validate
        from ts_handlers.store.remote.objects import RemoteObjects

        pairs = {}
        for option in self.option:
            name, separator, value = option.partition("=")
            if not separator:
                raise typer.BadParameter(f"--option: expected NAME=VALUE, found {name!r}")
            pairs[name] = value
        settings = RemoteSettings(self.url, timeout_seconds=self.timeout, options=pairs, client=self.client.value)
        validate(Settings(remote=settings))
        return RemoteObjects(settings, None)


@dataclasses.dataclass(frozen=True)
class EntryFilter(OptionGroup):
    """Which entries; all by default."""

    model: Annotated[str | None, typer.Option("--model", metavar="NAME", help="Only entries of this model.")] = None
    key: Annotated[list[str], typer.Option("--key", metavar="KEY", help="Only keys that start so.")] = (
        dataclasses.field(default_factory=list)
    )

    def accepts(self, subject: str) -> bool:
        """Whether an address ``<model>/.../<key>`` is of the model and of one of the keys."""
        from ts_handlers.store.address import safe_name

        parts = subject.split("/")
        return (self.model is None or parts[0] in (self.model, safe_name(self.model))) and (
            not self.key or any(parts[-1].startswith(key.lower()) for key in self.key)
        )

    def select(self, store: LocalStore) -> list[EntryInfo]:
        """The entries of a store that are meant."""
        from ts_handlers.store.upkeep.scan import scan_entries

        return [entry for entry in scan_entries(store.root) if self.accepts(f"{entry.model}/{entry.key}")]


def open_keyring(public_keys: list[Path], signing_key: Path | None = None) -> Keyring:
    """The keys that the options name.

    Raises
    ------
    SettingsError
        A file holds no key of the right kind.
    """
    from ts_handlers.settings.sections import TrustSettings
    from ts_handlers.store.remote.signing import load_keyring

    signing = None if signing_key is None else str(signing_key)
    return load_keyring(TrustSettings(tuple(map(str, public_keys)) or None, signing))


def report(moved: Iterable[Moved], as_json: bool) -> ExitCode:
    """Print what became of each entry; `ExitCode.FINDINGS` when one was refused or failed."""
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

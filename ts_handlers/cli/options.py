"""Options that every verb has, and opening the store that they name."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ts_handlers.errors import StoreError
from ts_handlers.settings.location import default_store_root

if TYPE_CHECKING:
    from ts_handlers.store.local.store import LocalStore
    from ts_handlers.store.upkeep.scan import EntryInfo

StoreOption = Annotated[
    Path | None,
    typer.Option(
        "--store",
        metavar="PATH",
        help="Root of the store; otherwise TS_HANDLERS_CACHE, $XDG_CACHE_HOME/ts_handlers or ~/.cache/ts_handlers.",
    ),
]
TrustedFolders = Annotated[
    list[Path],
    typer.Option(
        "--trust-folder",
        metavar="PATH",
        help="A folder above the store whose owner and mode are accepted as they are; may be given repeatedly.",
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON for programs instead of a table.")]
KeyArgument = Annotated[str, typer.Argument(metavar="KEY", help="A key, or enough of its first digits.")]


def absolute(folders: list[Path]) -> list[str]:
    """Folders of the command line as the settings want them."""
    return [str(folder.expanduser().absolute()) for folder in folders]


def open_existing_store(path: Path | None, trusted_folders: list[Path] | None = None) -> LocalStore:
    """The store that `path` names (None: the default one), which must exist.

    The owner and mode of `trusted_folders` above it are accepted as they are.

    Raises
    ------
    StoreError
        There is none, or it is not safe to use.
    """
    from ts_handlers.store.local.store import LocalStore

    root = Path(path or default_store_root()).expanduser().absolute()
    if not root.exists():
        raise StoreError(f"there is no store at {root}; name another one with --store or TS_HANDLERS_CACHE")
    return LocalStore(root, absolute(trusted_folders or []))


def find_entries(store: LocalStore, prefix: str) -> list[EntryInfo]:
    """The entries of the one key that starts with `prefix`; models with the same content share a key.

    Raises
    ------
    typer.BadParameter
        No key or several keys start so.
    """
    from ts_handlers.store.upkeep.scan import scan_entries

    found = [entry for entry in scan_entries(store.root) if entry.key.startswith(prefix.lower())]
    keys = sorted({entry.key for entry in found})
    if not keys:
        raise typer.BadParameter(f"no key in {store.root} starts with {prefix!r}; `ts-handlers ls` lists them")
    if len(keys) > 1:
        raise typer.BadParameter(f"{len(keys)} keys start with {prefix!r}: {', '.join(keys[:8])}; give more digits")
    return found

"""Options that most verbs have, and finding a key in the store that they name."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ts_handlers.cli.option_groups import OptionGroup
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


@dataclasses.dataclass(frozen=True)
class StoreOptions(OptionGroup):
    """Which store, and which folders above it are accepted as they are."""

    trust_folder: TrustedFolders = dataclasses.field(default_factory=list)
    store: StoreOption = None

    def open(self) -> LocalStore:
        """The store, which must exist.

        Raises
        ------
        StoreError
            There is none, or it is not safe to use.
        """
        root = self.path()
        if not root.exists():
            raise StoreError(f"there is no store at {root}; name another one with --store or TS_HANDLERS_CACHE")
        return self._open(root)

    def path(self) -> Path:
        """Where the store lies, or will lie."""
        return self._root.expanduser().absolute()

    def make(self) -> LocalStore:
        """The store, which is made if it does not exist.

        Raises
        ------
        StoreError
            It cannot be made, or is not safe to use.
        """
        return self._open(self._root)

    @property
    def _root(self) -> Path:
        return Path(self.store or default_store_root())

    def _open(self, root: Path) -> LocalStore:
        from ts_handlers.store.local.store import LocalStore

        return LocalStore(root, [str(folder.expanduser().absolute()) for folder in self.trust_folder])


def find_entries(store: LocalStore, prefix: str) -> list[EntryInfo]:
    """The entries of the one key that starts with `prefix`; models with the same content share a key.

    Raises
    ------
    typer.BadParameter
        No key or several keys start so.
    """
    from ts_handlers.store.upkeep.scan import scan_entries

    found = scan_entries(store.root)
    none = f"no key in {store.root} starts with {prefix!r}; `ts-handlers ls` lists them"
    key = one_key((entry.key for entry in found), prefix, none)
    return [entry for entry in found if entry.key == key]


def one_key(keys: Iterable[str], prefix: str, none: str, kind: str = "keys") -> str:
    """The one key that starts with `prefix`.

    Parameters
    ----------
    none:
        The message when no key starts so.
    kind:
        What the keys are called in the message when several start so.

    Raises
    ------
    typer.BadParameter
        No key or several keys start so.

    Examples
    --------
    >>> one_key(["ab01", "cd23", "ab01"], "AB", "no key")
    'ab01'
    """
    if not prefix:
        raise typer.BadParameter(f"expected the first digits of one of the {kind}, found nothing")
    found = sorted({key for key in keys if key.startswith(prefix.lower())})
    if not found:
        raise typer.BadParameter(none)
    if len(found) > 1:
        raise typer.BadParameter(f"{len(found)} {kind} start with {prefix!r}: {', '.join(found[:8])}; give more digits")
    return found[0]


ArchiveArgument = Annotated[Path, typer.Argument(metavar="ARCHIVE", help="A .mar or .tgz file, or a model's folder.")]
DeviceOption = Annotated[
    str | None, typer.Option(help="cpu, cuda or cuda:<index>; otherwise the first GPU if there is one.")
]
ConfigOption = Annotated[
    Path | None, typer.Option(metavar="YAML", help="Takes the place of the archive's model-config.yaml.")
]
ModelNameOption = Annotated[
    str | None, typer.Option(help="The name that TorchServe serves the archive under; otherwise its own.")
]

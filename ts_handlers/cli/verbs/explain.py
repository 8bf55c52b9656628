"""`ts-handlers explain`."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ts_handlers.cli.exit_codes import ExitCode
from ts_handlers.cli.options import ConfigOption, JsonOption, ModelNameOption, StoreOptions, find_entries
from ts_handlers.cli.output import print_json, print_table, say
from ts_handlers.key.cache_key import CacheKey, explain, only_differing

if TYPE_CHECKING:
    from ts_handlers.servers.torchserve.archive_keys import ArchiveKey
    from ts_handlers.store.local.store import LocalStore


def command(
    what: Annotated[
        str,
        typer.Argument(metavar="ARCHIVE|KEY", help="A .mar file or a model's folder; or a key, or its first digits."),
    ],
    other: Annotated[
        str | None,
        typer.Argument(
            metavar="[KEY]", help="The key to compare with; an archive takes the nearest entry of its model."
        ),
    ] = None,
    *,
    device: Annotated[
        str | None,
        typer.Option(help="Of an archive: cpu, cuda or cuda:<index>; otherwise the first GPU if there is one."),
    ] = None,
    config: ConfigOption = None,
    model_name: ModelNameOption = None,
    store: StoreOptions,
    as_json: JsonOption = False,
) -> ExitCode:
    """Say in which parts two keys differ, or why a start of an archive's model on this machine would miss.

    For an archive its handler is imported and run up to the start of its model. Ends with 1 when keys differ.
    """
    opened = store.open()
    left_out: tuple[str, ...] = ()
    if Path(what).exists():
        from ts_handlers.servers.torchserve.archive_keys import archive_keys

        with contextlib.redirect_stdout(sys.stderr):  # what the archive's own code prints
            wanted = archive_keys(what, opened, device=device, config=config, model_name=model_name)
        pairs = _archive_pairs(opened, wanted, other)
        left_out = tuple(sorted({name for item in wanted for name in item.left_out}))
    elif other is None:
        raise typer.BadParameter(f"{what!r} is no file or folder; name an archive, or two keys")
    else:
        pairs = [("", _key(opened, what), _key(opened, other))]
    found = [{**_difference(*pair), "left_out": list(left_out)} for pair in pairs]
    if as_json:
        print_json(found)
    else:
        for item in found:
            _print(item)
        if left_out:
            print(f"no part of the key, since it differs between processes: {', '.join(left_out)}")
    return ExitCode.FINDINGS if any(item["differs"] or item["right"] is None for item in found) else ExitCode.OK


def _archive_pairs(
    store: LocalStore, wanted: list[ArchiveKey], other: str | None
) -> list[tuple[str, CacheKey, CacheKey | None]]:
    """For each backend of the archive's fallback order: its key, and the one to compare it with."""
    from ts_handlers.servers.torchserve.archive_keys import nearest_entry
    from ts_handlers.store.upkeep.scan import scan_entries

    if other is not None:
        key = _key(store, other)
        return [(f"{item.model}, {item.backend}", item.key, key) for item in wanted if item.backend == key["backend"]]
    pairs: list[tuple[str, CacheKey, CacheKey | None]] = []
    entries = scan_entries(store.root)
    for item in wanted:
        entry = nearest_entry(item, entries)
        key_found = entry.manifest.cache_key if entry is not None and entry.manifest is not None else None
        pairs.append((f"{item.model}, {item.backend}", item.key, key_found))
    return pairs


def _key(store: LocalStore, prefix: str) -> CacheKey:
    entry = find_entries(store, prefix)[0]
    if entry.manifest is None:
        raise typer.BadParameter(f"the entry {entry.key} is damaged ({entry.problem}); `ts-handlers verify --repair`")
    return entry.manifest.cache_key


def _difference(what: str, left: CacheKey, right: CacheKey | None) -> dict[str, Any]:
    parts = [] if right is None else explain(left, right)
    return {
        "what": what,
        "left": left.digest,
        "right": None if right is None else right.digest,
        "differs": [{"part": name, "left": a, "right": b} for name, a, b in parts],
    }


def _print(item: dict[str, Any]) -> None:
    what = f"{item['what']}: " if item["what"] else ""
    left, right = item["left"][:12], item["right"] and item["right"][:12]
    if right is None:
        say(f"{what}{left} is not in the store, nor is any other entry of this model and backend")
    elif not item["differs"]:
        say(f"{what}{left} is in the store" if what else f"{left} is the same key")
    else:
        rows = [(part["part"], *only_differing(part["left"], part["right"])) for part in item["differs"]]
        print_table(("part", left, right), rows, title=f"{what}{left} differs from {right}")

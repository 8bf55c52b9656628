"""`ts-handlers ls`."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated

import typer

from ts_handlers.cli.exit_codes import ExitCode
from ts_handlers.cli.options import JsonOption, StoreOptions
from ts_handlers.cli.output import human_age, human_bytes, print_json, print_quarantines, print_table, say, timestamp

if TYPE_CHECKING:
    from ts_handlers.store.upkeep.scan import EntryInfo


def command(
    model: Annotated[str, typer.Argument(metavar="[MODEL]", help="Only models whose name fits this pattern.")] = "*",
    *,
    store: StoreOptions,
    as_json: JsonOption = False,
) -> ExitCode:
    """List the entries: model, backend, device, key, size, age, last use, uses, state; what is quarantined or failed.

    Ends with 1 when an entry is not `ok`, something is quarantined or a build has failed. Digests are not computed; see
    `ts-handlers verify`.
    """
    from ts_handlers.guard.quarantine import read_quarantines
    from ts_handlers.guard.records import stored_fields
    from ts_handlers.store.upkeep.scan import scan_entries, scan_trash

    opened = store.open()
    entries = [entry for entry in scan_entries(opened.root) if fnmatch.fnmatchcase(entry.model, model)]
    trash = scan_trash(opened.root)
    records = [record for record in read_quarantines(opened.root) if fnmatch.fnmatchcase(record.model, model)]
    reasons = {(record.key, record.digest): record.reason for record in records}
    total = {
        "entries": len(entries),
        "bytes": sum(entry.bytes for entry in entries),
        "inodes": sum(entry.inodes for entry in entries),
    }
    if as_json:
        rows = [
            {
                "model": entry.model,
                "backend": entry.backend,
                "device": entry.device,
                "key": entry.key,
                "bytes": entry.bytes,
                "inodes": entry.inodes,
                "published": timestamp(entry.published),
                "last_used": timestamp(entry.last_used),
                "uses": entry.uses,
                "pinned": entry.pinned,
                "state": entry.state,
                "problem": entry.problem,
            }
            for entry in entries
        ]
        aside = [{"name": item.name, "reason": item.reason, "bytes": item.bytes} for item in trash]
        facts = {"store": str(opened.root), "entries": rows, "moved_aside": aside, "total": total}
        print_json({**facts, "quarantined": [stored_fields(record) for record in records]})
    else:
        print_table(
            ("model", "backend", "device", "key", ">size", ">age", ">last use", ">uses", "pinned", "state"),
            (
                (
                    entry.model,
                    entry.backend,
                    entry.device,
                    entry.key[:12],
                    human_bytes(entry.bytes),
                    human_age(entry.published),
                    human_age(entry.last_used),
                    entry.uses,
                    "pinned" if entry.pinned else "",
                    _state(entry, reasons),
                )
                for entry in entries
            ),
        )
        say(f"{total['entries']} entries, {human_bytes(total['bytes'])}, {total['inodes']} inodes in {opened.root}")
        if trash:
            say(f"{len(trash)} moved aside, {human_bytes(sum(item.bytes for item in trash))}; `ts-handlers gc`")
        if records:
            say("\nquarantined or failed: not tried with the same libraries; `ts-handlers unquarantine KEY` lifts it")
            print_quarantines(records)
    return ExitCode.OK if all(entry.state == "ok" for entry in entries) and not records else ExitCode.FINDINGS


def _state(entry: EntryInfo, reasons: Mapping[tuple[str, str], str]) -> str:
    if entry.problem is not None:
        return f"{entry.state}: {entry.problem}"
    digest = "" if entry.manifest is None else entry.manifest.digest
    return "quarantined" if (entry.key, digest) in reasons else entry.state

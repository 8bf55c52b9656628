"""`ts-handlers show`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import typer

from ts_handlers.cli.exit_codes import ExitCode
from ts_handlers.cli.options import (
    JsonOption,
    KeyArgument,
    StoreOptions,
    find_entries,
)
from ts_handlers.cli.output import human_bytes, print_json, print_quarantines, print_table, say, timestamp

if TYPE_CHECKING:
    from ts_handlers.store.upkeep.scan import EntryInfo


def command(
    key: KeyArgument,
    store: StoreOptions,
    as_json: JsonOption = False,
) -> ExitCode:
    """Show one key's entry: the key's parts, files, build timings, recorded facts, canaries; and what went wrong.

    What is quarantined under the key, and builds of it that have failed, are shown also where there is no entry.
    """
    from ts_handlers.guard.quarantine import read_quarantines
    from ts_handlers.guard.records import stored_fields
    from ts_handlers.store.upkeep.scan import canaries_of

    opened = store.open()
    records = read_quarantines(opened.root, key.lower())
    try:
        found = find_entries(opened, key)
    except typer.BadParameter:
        if len({record.key for record in records}) != 1:
            raise
        found = []
    digest = found[0].key if found else records[0].key
    records = [record for record in records if record.key == digest]
    canaries = [path.name for path in canaries_of(opened.root, digest)]
    facts = [_facts(entry, canaries) for entry in found] or [{"key": digest, "state": "no entry"}]
    if as_json:
        quarantined = [stored_fields(record) for record in records]
        print_json([{**fact, "quarantined": quarantined} for fact in facts])
    else:
        for entry, fact in zip(found, facts, strict=False):
            _print(entry, fact)
        if records:
            say("" if found else f"no entry of key {digest}\n")
            print_quarantines(records)
    sound = found and not records and all(entry.state == "ok" for entry in found)
    return ExitCode.OK if sound else ExitCode.FINDINGS


def _facts(entry: EntryInfo, canaries: list[str]) -> dict[str, Any]:
    manifest = entry.manifest
    return {
        "key": entry.key,
        "directory": str(entry.directory),
        "model": entry.model,
        "backend": entry.backend,
        "device": entry.device,
        "state": entry.state,
        "problem": entry.problem,
        "pinned": entry.pinned,
        "published": timestamp(entry.published),
        "last_used": timestamp(entry.last_used),
        "uses": entry.uses,
        "bytes": entry.bytes,
        "inodes": entry.inodes,
        "parts": {} if manifest is None else dict(manifest.key),
        "files": {}
        if manifest is None
        else {name: {"bytes": record.size, "sha256": record.sha256} for name, record in manifest.files.items()},
        "build_ms": {} if manifest is None else manifest.build_ms,
        "recorded": {} if manifest is None else manifest.recorded,
        "artifact": {} if manifest is None else manifest.artifact,
        "canaries": canaries,
    }


def _print(entry: EntryInfo, facts: dict[str, Any]) -> None:
    lists = ("parts", "files", "build_ms", "recorded", "artifact", "canaries")
    facts["bytes"] = human_bytes(entry.bytes)
    print_table(("entry", ""), [(name, value) for name, value in facts.items() if name not in lists])
    for name in ("parts", "recorded", "build_ms"):
        print()
        print_table((name, ""), facts[name].items())
    print()
    files = facts["files"].items()
    print_table(("file", ">bytes", "sha256"), [(name, file["bytes"], file["sha256"][:16]) for name, file in files])
    print()
    print_table(("canaries, by weights",), [(name,) for name in facts["canaries"]])

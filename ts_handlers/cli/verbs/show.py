"""`ts-handlers show`."""

from __future__ import annotations

from typing import Any

from ts_handlers.cli.exit_codes import ExitCode
from ts_handlers.cli.options import (
    JsonOption,
    KeyArgument,
    StoreOption,
    TrustedFolders,
    find_entries,
    open_existing_store,
)
from ts_handlers.cli.output import human_bytes, print_json, print_table, timestamp
from ts_handlers.store.scan import EntryInfo


def command(
    key: KeyArgument,
    trust_folder: TrustedFolders = [],  # noqa: B006  (typer copies it)
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> ExitCode:
    """Show one entry: its key's parts, files, build timings, recorded facts and canaries."""
    from ts_handlers.store.scan import canaries_of

    opened = open_existing_store(store, trust_folder)
    found = find_entries(opened, key)
    canaries = [path.name for path in canaries_of(opened.root, found[0].key)]
    facts = [_facts(entry, canaries) for entry in found]
    if as_json:
        print_json(facts)
    else:
        for entry, fact in zip(found, facts, strict=True):
            _print(entry, fact)
    return ExitCode.OK if all(entry.state == "ok" for entry in found) else ExitCode.FINDINGS


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

"""`ts-handlers explain`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from ts_handlers.cache_key import CacheKey, explain
from ts_handlers.cli.exit_codes import ExitCode
from ts_handlers.cli.options import JsonOption, StoreOption, find_entries, open_existing_store
from ts_handlers.cli.output import print_json, print_table


def command(
    key: Annotated[str, typer.Argument(metavar="KEY", help="A key, or enough of its first digits.")],
    other: Annotated[str, typer.Argument(metavar="OTHER", help="The key to compare it with.")],
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> ExitCode:
    """Say in which parts two keys differ; ends with 1 when they do."""
    opened = open_existing_store(store)
    keys = []
    for prefix in (key, other):
        entry = find_entries(opened, prefix)[0]
        if entry.manifest is None:
            raise typer.BadParameter(
                f"the entry {entry.key} is damaged ({entry.problem}); `ts-handlers verify --repair`"
            )
        keys.append(entry.manifest.cache_key)
    return print_differences([("", keys[0], keys[1])], as_json)


def print_differences(pairs: list[tuple[str, CacheKey, CacheKey]], as_json: bool) -> ExitCode:
    """Print in which parts the keys of each pair differ; `pairs` begin with a word on what is compared."""
    found: list[dict[str, Any]] = []
    for what, left, right in pairs:
        parts = [{"part": name, "left": a, "right": b} for name, a, b in explain(left, right)]
        found.append({"what": what, "left": left.digest, "right": right.digest, "differs": parts})
    if as_json:
        print_json(found)
    else:
        for item in found:
            title = f"{item['what']}{item['left'][:12]} and {item['right'][:12]}"
            if not item["differs"]:
                print(f"{title}: the same key")
                continue
            rows = [(part["part"], *only_differing(part["left"], part["right"])) for part in item["differs"]]
            print_table(("part", item["left"][:12], item["right"][:12]), rows, title=title)
    return ExitCode.FINDINGS if any(item["differs"] for item in found) else ExitCode.OK


def only_differing(left: str, right: str) -> tuple[str, str]:
    """The words of two values that the other one does not have.

    Examples
    --------
    >>> only_differing("x86_64 avx avx2", "x86_64 avx")
    ('avx2', '')
    >>> only_differing("1f", "2e")
    ('1f', '2e')
    """
    words, others = left.split(), right.split()
    return " ".join(word for word in words if word not in others), " ".join(w for w in others if w not in words)

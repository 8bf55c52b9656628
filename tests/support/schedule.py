"""The order in which workers of pytest take the tests, and what stays together; see ``--dist loadgroup``.

A worker takes one test after the other. Tests that share a fixture of their module stay with one worker, which makes it
once. The costly ones are first, so that no worker is left with one at the end; those that wait for TorchServe are mixed
with those that compile.
"""

from __future__ import annotations

import pytest

_ORDER = ("serving", "compile", "gpu", "processes", "services")
_TOGETHER = 2
"""So many of the first marks are mixed."""


def plan(items: list[pytest.Item]) -> None:
    """Group and sort the collected tests."""
    ranks = [_rank(item) for item in items]
    seen, keys = dict.fromkeys(ranks, 0), {}
    for item, rank in zip(items, ranks, strict=True):
        seen[rank] += 1
        keys[item] = (max(rank, _TOGETHER - 1), seen[rank] / ranks.count(rank) if rank < _TOGETHER else 0.0)
        if _shares_a_fixture(item):
            item.add_marker(pytest.mark.xdist_group(f"{item.path.parent.name}.{item.path.stem}"))
    items.sort(key=keys.__getitem__)


def _rank(item: pytest.Item) -> int:
    marks = {mark.name for mark in item.iter_markers()}
    return next((rank for rank, mark in enumerate(_ORDER) if mark in marks), len(_ORDER))


def _shares_a_fixture(item: pytest.Item) -> bool:
    known = getattr(item, "_fixtureinfo", None)
    definitions = known.name2fixturedefs.values() if known else ()
    return any(each.scope in ("module", "class") and each.baseid for every in definitions for each in every[-1:])

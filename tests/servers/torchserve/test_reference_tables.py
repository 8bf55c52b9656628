"""The tables of docs/metrics.md and docs/errors.md are those of the code."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.reference_tables import failure_rows, metric_rows, renamed_rows
from ts_handlers.monitoring.catalogue import FAILURE_KINDS
from ts_handlers.servers.torchserve.failures import FAILURES

DOCS = Path(__file__).parents[3] / "docs"


@pytest.mark.parametrize(
    ("document", "rows"),
    [("metrics.md", metric_rows()), ("metrics.md", renamed_rows()), ("errors.md", failure_rows())],
    ids=["metrics", "deprecated names", "failures"],
)
def test_a_table_holds_each_row_of_the_code(document: str, rows: list[str]) -> None:
    lines = (DOCS / document).read_text("utf-8").splitlines()
    assert [row for row in rows if row not in lines] == []


def test_no_table_holds_a_metric_that_does_not_exist() -> None:
    lines = (DOCS / "metrics.md").read_text("utf-8").splitlines()
    named = [line for line in lines if line.startswith("| `ts_handlers_") and line.count(" | ") == 3]
    assert named == metric_rows()


def test_the_metric_has_the_kinds_of_the_table() -> None:
    assert tuple(each.kind for each in FAILURES) == FAILURE_KINDS

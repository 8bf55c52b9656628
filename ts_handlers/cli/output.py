"""What verbs print: JSON for programs, tables for people."""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from ts_handlers.system.durations import span

if TYPE_CHECKING:
    from ts_handlers.guard.records import Record


def printable(text: str, keep: str = "\n\t") -> str:
    """A text in which control characters are written as escapes: names and reasons may come from anybody.

    Parameters
    ----------
    keep:
        Control characters that stay.

    Examples
    --------
    >>> print(printable("model" + chr(27) + "]0;title" + chr(7)))
    model\\x1b]0;title\\x07
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in keep else c.encode("unicode_escape").decode() for c in text)


def say(text: str, **options: Any) -> None:
    """Print a line without control characters; the options are those of `print`."""
    print(printable(text), **options)


class PrintableFormatter(logging.Formatter):
    """Log lines without control characters."""

    def format(self, record: logging.LogRecord) -> str:
        """See `logging.Formatter`."""
        return printable(super().format(record))


def print_json(value: Any) -> None:
    """Print JSON-compatible data."""
    print(json.dumps(value, indent=2))


def print_table(columns: Sequence[str], rows: Iterable[Sequence[object]], title: str | None = None) -> None:
    """Print rows under column names; a column whose name starts with ``>`` is aligned to the right.

    In a pipe nothing is cut off, whatever the terminal's width.
    """
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for column in columns:
        right = column.startswith(">")
        table.add_column(column.removeprefix(">"), justify="right" if right else "left", overflow="fold")
    for row in rows:
        table.add_row(*map(_plain, row))
    Console(width=None if sys.stdout.isatty() else 4096, highlight=False).print(table)


def print_quarantines(records: Iterable[Record]) -> None:
    """Print what is quarantined and which builds have failed."""
    print_table(
        ("model", "backend", "key", "since", "phase", "times", "tried again", "reason"),
        [(r.model, r.backend, r.key[:12], r.time, r.phase, r.count, r.retry, r.reason) for r in records],
    )


def _plain(value: object) -> Any:
    from rich.text import Text

    return Text("" if value is None else printable(str(value), keep=""))  # a text: brackets in names are no markup


def human_bytes(count: int | float) -> str:
    """A size in bytes for people.

    Examples
    --------
    >>> human_bytes(17), human_bytes(1536), human_bytes(20 * 2**30)
    ('17 B', '1.5 KiB', '20.0 GiB')
    """
    if count < 1024:
        return f"{int(count)} B"
    for unit in ("KiB", "MiB", "GiB"):
        count /= 1024
        if count < 1024:
            return f"{count:.1f} {unit}"
    return f"{count / 1024:.1f} TiB"


def human_age(then: float | None, now: float | None = None) -> str:
    """How long ago a time (seconds since the epoch) was.

    Examples
    --------
    >>> human_age(1000, 1030), human_age(1000, 1000 + 7200), human_age(0, 86400 * 3), human_age(None)
    ('30 s', '2 h', '3 d', 'never')
    """
    if then is None:
        return "never"
    return span((time.time() if now is None else now) - then)


def timestamp(seconds: float | None) -> str | None:
    """ISO 8601 in UTC, for JSON."""
    return None if seconds is None else time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))

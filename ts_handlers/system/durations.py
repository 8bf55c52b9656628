"""Durations as text for people."""

from __future__ import annotations


def span(seconds: float) -> str:
    """A duration in the unit that fits.

    Examples
    --------
    >>> span(30), span(200), span(7200), span(86400 * 3), span(-1)
    ('30 s', '3 min', '2 h', '3 d', '0 s')
    """
    seconds = max(0.0, seconds)
    for limit, unit, size in ((120, "s", 1), (7200, "min", 60), (172800, "h", 3600)):
        if seconds < limit:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds / 86400:.0f} d"

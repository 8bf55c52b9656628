"""Sizes in bytes and durations as people write them."""

from __future__ import annotations

import re

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]i?)?b?\s*", re.IGNORECASE)


def parse_bytes(value: int | str) -> int:
    """A number of bytes from a number or a text with a unit (KB, MB, GB, TB; KiB, MiB, GiB, TiB).

    Raises
    ------
    ValueError
        It is neither, or negative.

    Examples
    --------
    >>> parse_bytes(17), parse_bytes("20GiB"), parse_bytes("1.5 kB"), parse_bytes("0")
    (17, 21474836480, 1500, 0)
    >>> parse_bytes("20 apples")
    Traceback (most recent call last):
    ValueError: expected a number of bytes such as 500MB or 20GiB, found '20 apples'
    """
    match = _SIZE.fullmatch(str(value))
    if match is None:
        raise ValueError(f"expected a number of bytes such as 500MB or 20GiB, found {value!r}")
    return int(float(match[1]) * _UNITS[(match[2] or "").lower()]) if match[2] or "." in match[1] else int(match[1])


_SPANS = {"": 1.0, "ms": 0.001, "s": 1.0, "min": 60.0, "h": 3600.0, "d": 86400.0}
_SPAN = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*")


def parse_seconds(value: float | str) -> float:
    """Seconds from a number or a text with a unit (ms, s, min, h, d).

    Raises
    ------
    ValueError
        It is neither, or negative.

    Examples
    --------
    >>> parse_seconds(1.5), parse_seconds("10min"), parse_seconds("250 ms")
    (1.5, 600.0, 0.25)
    >>> parse_seconds("ten minutes")
    Traceback (most recent call last):
    ValueError: expected a duration such as 30s, 10min or 2h, found 'ten minutes'
    """
    match = _SPAN.fullmatch(str(value))
    if match is None or match[2] not in _SPANS:
        raise ValueError(f"expected a duration such as 30s, 10min or 2h, found {value!r}")
    return float(match[1]) * _SPANS[match[2]]

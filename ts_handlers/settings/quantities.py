"""Sizes in bytes as people write them."""

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

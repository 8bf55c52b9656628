"""Names of what shapes a model from outside its archive, as `ts_handlers.key.outside` lists them; needs no torch."""

from __future__ import annotations

import hashlib

Names = frozenset[str]
NO_NAMES: Names = frozenset()


def names_digest(names: Names) -> str:
    """What a set of names is called in the store."""
    return hashlib.sha256("\n".join(sorted(names)).encode()).hexdigest()[:32]


LIBRARIES = ("distribution:", "module:", "code:")
"""Beginnings of the names of libraries; the others are files, folders and variables."""

"""Object naming: what the sealed entries and records in a remote store are called.

An object is written once and never replaced. Its name ends with a version number, counted from 0. The first version
whose signature and digests this host accepts is used; a refused one is skipped. So nobody's object can be taken for
another's, a reader never sees two, and what a removed public key accepted is followed by what its successor accepts.
"""

from __future__ import annotations

from ts_handlers.store.address import Address, entry_path, safe_weights
from ts_handlers.store.local.layout import CANARIES, ENTRIES, OUTSIDE

VERSIONS = 4
"""How many objects of one name are looked at and written."""


def entry_name(address: Address) -> str:
    """The name of an entry's objects, without the version number."""
    return f"{ENTRIES}/{entry_path(address)}"


def canary_name(key: str, weights_digest: str) -> str:
    """The name of a canary record's objects, without the version number."""
    return f"{CANARIES}/{canary_subject(key, weights_digest)}"


def canary_subject(key: str, weights_digest: str) -> str:
    """The subject of a sealed canary record."""
    return f"{key}/{safe_weights(weights_digest)}"


def outside_name(base: str, digest: str = "") -> str:
    """The name of a record of what a model reads, without the version number; without `digest` their folder."""
    return f"{OUTSIDE}/{base}/{digest}" if digest else f"{OUTSIDE}/{base}"


def version_names(name: str) -> list[str]:
    """The names of the objects of an entry or of a canary record, in the order in which they are looked at.

    Examples
    --------
    >>> version_names("canaries/key/weights")[:2]
    ['canaries/key/weights.0', 'canaries/key/weights.1']
    """
    return [f"{name}.{version}" for version in range(VERSIONS)]

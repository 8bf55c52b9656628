"""Records of what making a model reads from outside its archive: names, never values.

A record lies in ``outside/<base key>/``, where the base key is the digest of a key without its part ``outside``. It is
called by the digest of its names, is written once and holds them as JSON; `read_names` compares the two. The names of
all records of a base key together hold, so that two processes that learn different names lose none.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

from ts_handlers.errors import UNDECODABLE
from ts_handlers.key.names import NO_NAMES, Names, names_digest

LIMIT = 16 << 20
"""Bytes of a record."""
RECORDED = "outside"
"""Under this name a manifest holds the names that were known when its entry was built, in ``recorded``."""
_KINDS = ("variable:", "file:", "folder:", "archive:", "distribution:", "module:", "code:")


def encode_names(names: Names) -> bytes:
    """Names as the content of a record."""
    return json.dumps(sorted(names)).encode()


def decode_names(data: bytes) -> Names:
    """Names from the content of a record. Raises `ValueError` when it is damaged."""
    try:
        found = json.loads(data)
    except UNDECODABLE as error:
        raise ValueError(f"it is no JSON: {error}") from error
    if not isinstance(found, list) or not all(isinstance(name, str) and name.startswith(_KINDS) for name in found):
        raise ValueError("it is no list of names")
    return frozenset(found)


def read_names(digest: str, data: bytes) -> Names:
    """The names of a record. Raises `ValueError` when it is damaged or another one than its name says."""
    names = decode_names(data)
    if names_digest(names) != digest:
        raise ValueError("its names are others than its name says")
    return names


def names_of_manifest(recorded: Mapping[str, str]) -> Names:
    """The names in a manifest's `recorded`; none in manifests of versions that did not record them."""
    try:
        return decode_names(recorded[RECORDED].encode()) if RECORDED in recorded else NO_NAMES
    except ValueError:
        return NO_NAMES

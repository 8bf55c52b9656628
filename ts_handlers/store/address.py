"""TODO: address.py."""

from __future__ import annotations

import dataclasses
import re

from ts_handlers.key.cache_key import CacheKey


@dataclasses.dataclass(frozen=True)
class Address:
    """The visible address of a key: ``<model>/<model digest>/<device>/<key>``."""

    model: str
    model_digest: str
    device: str
    key: CacheKey


def entry_path(address: Address) -> str:
    """The path of an entry below ``entries``, here and in a remote store."""
    return "/".join(map(safe_name, (address.model, address.model_digest[:16], address.device, address.key.digest)))


def safe_name(name: str) -> str:
    """A name as the store's files and folders have it."""
    safe = re.sub(r"[^A-Za-z0-9_.=-]+", "_", name)
    return safe if safe.strip(".") else "_"

"""Where an entry lies: a path made of the model's name and digests, the device, and the cache key."""

from __future__ import annotations

import dataclasses
import re

from ts_handlers.key.cache_key import CacheKey


@dataclasses.dataclass(frozen=True)
class Address:
    """What leads to one entry of a store.

    Attributes
    ----------
    model: the model's name.
    model_digest: digest of its source and tensor specification, 64 hexadecimal digits.
    device: the kind of device, as `ts_handlers.key.fingerprint.device_slug` names it.
    key: the cache key.

    Examples
    --------
    >>> key = CacheKey((("format", "1"),))
    >>> entry_path(Address("my model", "ab" * 32, "cpu-x86_64", key)).rpartition("/")[0]
    'my_model/abababababababab/cpu-x86_64'
    """

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

"""Where an entry lies: a path made of the model's name and digests, the device, and the cache key."""

from __future__ import annotations

import dataclasses
import hashlib
import re

from ts_handlers.key.cache_key import CacheKey
from ts_handlers.system.files import NAME_LIMIT


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


def safe_name(name: str, limit: int = NAME_LIMIT) -> str:
    """A name as the store's files and folders have it: plain characters, and no more bytes than a file system accepts.

    Parameters
    ----------
    limit:
        Bytes; less than `ts_handlers.system.files.NAME_LIMIT` where something is put before or behind the name.

    Examples
    --------
    >>> safe_name("my model"), len(safe_name("m" * 300))
    ('my_model', 255)
    """
    safe = re.sub(r"[^A-Za-z0-9_.=-]+", "_", name)
    safe = safe if safe.strip(".") else "_"
    if len(safe) <= limit:
        return safe
    # The digest is of the name, since two long names may differ in a character that is replaced alone.
    return f"{safe[: limit - 17]}-{hashlib.sha256(name.encode(errors='surrogatepass')).hexdigest()[:16]}"


def address_digest(address: Address) -> str:
    """Tells entries of one key apart, 16 hexadecimal digits: models with the same content share a key."""
    return hashlib.sha256(entry_path(address).encode()).hexdigest()[:16]


WEIGHTS_LIMIT = 180


def safe_weights(weights_digest: str) -> str:
    """A digest of weights as file names have it, with room for what stands before and behind it."""
    return safe_name(weights_digest, WEIGHTS_LIMIT)

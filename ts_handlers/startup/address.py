"""Under which key a model's artifact lies: what is known of its surroundings is part of that."""

from __future__ import annotations

from ts_handlers.backends.base import Backend, Target
from ts_handlers.key import fingerprint
from ts_handlers.key.cache_key import CacheKey
from ts_handlers.key.names import Names
from ts_handlers.key.parts import compute_key
from ts_handlers.store.address import Address
from ts_handlers.store.base import Store


def known_names(store: Store, target: Target, key: CacheKey) -> Names:
    """What making the model reads, as this process has seen it or the store knows it."""
    return store.read_outside(key.base.digest) | target.source.surroundings.names


def key_in_store(backend: Backend, target: Target, store: Store) -> CacheKey:
    """The key under which a backend's artifact is looked up and published in a store."""
    key = compute_key(backend, target)
    names = known_names(store, target, key)
    return compute_key(backend, target, names) if names else key


def address_in_store(backend: Backend, target: Target, store: Store) -> Address:
    """Where a backend's artifact belongs in a store."""
    return Address(
        model=target.source.name,
        model_digest=target.model_digest,
        device=fingerprint.device_slug(target.device),
        key=key_in_store(backend, target, store),
    )

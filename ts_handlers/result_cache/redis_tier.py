"""Answers that hosts share through a Redis server.

A key there is ``ts_handlers:result:<key in hexadecimal>``, and its value::

    b"tshr1" + BLAKE2b of the rest (16 bytes) + key (40 bytes) + answer

The digest tells a damaged value, and the key one that stands in a wrong place. Neither tells who wrote it: whoever may
write to the server can answer requests. Values are data that `ts_handlers.result_cache.replies` reads, never pickles.

A server that does not answer within the timeout is not asked for a minute by this host, see
`ts_handlers.store.remote.breaker`; requests are answered without it meanwhile.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ts_handlers.errors import RemoteError, StoreError
from ts_handlers.result_cache.base import Count, Key
from ts_handlers.store.remote.base import UnusableError
from ts_handlers.store.remote.breaker import Breaker
from ts_handlers.store.remote.budget import TimeBudget
from ts_handlers.store.remote.objects import redact, redact_url

_MAGIC = b"tshr1"
_TAG_BYTES = 16


class RedisTier:
    """A `SharedTier` in a Redis server.

    Parameters
    ----------
    url:
        ``redis://``, ``rediss://`` or ``unix://``, as redis-py takes it.
    timeout:
        Seconds that a request waits for the server at most.
    ttl:
        Seconds after which the server forgets an answer.
    max_bytes:
        Larger values are not fetched.
    count:
        Gets ``result_cache_remote_hit``, ``_remote_miss``, ``_remote_failed`` (requests that were answered without the
        server because it does not answer) and ``_remote_refused`` (values that must not be used).
    state:
        Folder for the circuit breaker's state, which the processes of a host share; None keeps it in this object.

    Raises
    ------
    UnusableError
        The package ``redis`` cannot be imported.
    """

    def __init__(
        self, url: str, timeout: float, ttl: float, max_bytes: int, count: Count, state: Path | None = None
    ) -> None:
        self._ttl_ms = max(1, int(ttl * 1000))
        self._max_bytes = max_bytes
        self._count = count
        parts = urlsplit(url)
        file = f"results-{parts.hostname or 'unix'}-{parts.port or 6379}.json"
        self._breaker = Breaker(
            None if state is None else state / file,
            redact_url(url),
            TimeBudget(timeout),
            lambda text: redact(text, url, {}),
        )
        self._client = _make_client(url, timeout)

    def get(self, keys: Collection[Key]) -> dict[Key, tuple[bytes, float]]:
        """See `SharedTier`."""
        wanted = list(keys)

        def run(client: Any) -> list[Any]:
            pipeline = client.pipeline(transaction=False)
            for key in wanted:
                pipeline.getrange(_name(key), 0, self._max_bytes)
                pipeline.pttl(_name(key))
            return list(pipeline.execute(raise_on_error=False))

        replies = self._run("asking for stored answers", run, len(wanted))
        if replies is None:
            return {}
        found: dict[Key, tuple[bytes, float]] = {}
        refused = 0
        for key, value, left_ms in zip(wanted, replies[::2], replies[1::2], strict=True):
            if value == b"" or left_ms == -2:  # there is none, or it has just ended
                continue
            stored = _unsealed(key, value) if isinstance(value, bytes) else None
            if stored is None or not isinstance(left_ms, int) or left_ms < 0:  # without an end it is none of ours
                refused += 1
            elif left_ms <= self._ttl_ms:  # otherwise of a host that keeps answers longer
                found[key] = stored, (self._ttl_ms - left_ms) / 1000
        for name, amount in (("hit", len(found)), ("miss", len(wanted) - len(found)), ("refused", refused)):
            if amount:
                self._count(f"result_cache_remote_{name}", amount)
        return found

    def put(self, stored: Sequence[tuple[Key, bytes]]) -> None:
        """See `SharedTier`."""

        def run(client: Any) -> bool:
            pipeline = client.pipeline(transaction=False)
            for key, answer in stored:
                pipeline.set(_name(key), _sealed(key, answer), px=self._ttl_ms)
            return not any(isinstance(reply, Exception) for reply in pipeline.execute(raise_on_error=False))

        if self._run("storing answers", run, 0) is False:  # its memory is full, or it may not be written
            self._count("result_cache_remote_failed", len(stored))

    def describe(self) -> dict[str, Any]:
        """The server's address without secrets, and why it is not asked; JSON-compatible."""
        is_open = self._breaker.is_open
        return {"server": self._breaker.name, "reason": self._breaker.reason if is_open else None}

    def _run(self, what: str, function: Callable[[Any], Any], requests: int) -> Any:
        def call(given_up: threading.Event) -> Any:
            return function(self._client)

        try:
            return self._breaker.call(what, call)
        except (RemoteError, StoreError, OSError):
            if requests:
                self._count("result_cache_remote_failed", requests)
            return None


def _make_client(url: str, timeout: float) -> Any:
    """A client that has not connected yet; importing its package may take longer than a request waits."""
    try:
        import redis
        from redis.backoff import NoBackoff
        from redis.retry import Retry
    except ImportError as error:
        raise UnusableError(
            f"the package 'redis' cannot be imported ({error}); pip install 'ts-handlers[remote]'"
        ) from error
    limits = {"socket_timeout": timeout, "socket_connect_timeout": timeout}
    return redis.Redis.from_url(url, retry=Retry(NoBackoff(), 0), **limits)


def _name(key: Key) -> str:
    return f"ts_handlers:result:{key.hex()}"


def _sealed(key: Key, answer: bytes) -> bytes:
    body = key + answer
    return _MAGIC + hashlib.blake2b(body, digest_size=_TAG_BYTES).digest() + body


def _unsealed(key: Key, value: bytes) -> bytes | None:
    """The answer in a value; None for one that is damaged, cut off, of another format or of another key."""
    tag, body = value[len(_MAGIC) : len(_MAGIC) + _TAG_BYTES], value[len(_MAGIC) + _TAG_BYTES :]
    if not value.startswith(_MAGIC) or hashlib.blake2b(body, digest_size=_TAG_BYTES).digest() != tag:
        return None
    return body[len(key) :] if body.startswith(key) else None

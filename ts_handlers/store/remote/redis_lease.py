"""Leases among hosts in a Redis server; each operation is one script, so that it is atomic.

Keys, for a lease called ``<name>``::

    ts_handlers:{<name>}:lease      token and random name of the holder; expires `LOST_AFTER` heartbeats after its
                                    last renewal
    ts_handlers:{<name>}:token      the last token given
    ts_handlers:{<name>}:released   the last token given back

The last two are forgotten after `FORGET_SECONDS` without an acquisition, far beyond the life of any holder.
"""

from __future__ import annotations

import threading
import uuid
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ts_handlers.store.remote.base import UnusableError
from ts_handlers.store.remote.breaker import Breaker
from ts_handlers.store.remote.budget import TimeBudget
from ts_handlers.store.remote.lease import LOST_AFTER, Busy, Grant
from ts_handlers.store.remote.objects import redact, redact_url

FORGET_SECONDS = 30 * 24 * 3600

_ACQUIRE = """
local holder = redis.call('GET', KEYS[1])
if holder then return {0, holder, redis.call('PTTL', KEYS[1])} end
local token = redis.call('INCR', KEYS[2])
local released = tonumber(redis.call('GET', KEYS[3]) or '0')
redis.call('SET', KEYS[1], token .. ' ' .. ARGV[1], 'PX', ARGV[2])
redis.call('EXPIRE', KEYS[2], ARGV[3])
redis.call('EXPIRE', KEYS[3], ARGV[3])
return {1, token, released}
"""
# A lease that expired while nobody wanted it is held again.
_RENEW = """
local mine = ARGV[1] .. ' ' .. ARGV[2]
local holder = redis.call('GET', KEYS[1])
if holder and holder ~= mine then return 0 end
if not holder and redis.call('GET', KEYS[2]) ~= ARGV[1] then return 0 end
redis.call('SET', KEYS[1], mine, 'PX', ARGV[3])
return 1
"""
_RELEASE = """
if redis.call('GET', KEYS[1]) ~= ARGV[1] .. ' ' .. ARGV[2] then return 0 end
redis.call('SET', KEYS[3], ARGV[1], 'EX', ARGV[3])
return redis.call('DEL', KEYS[1])
"""


class RedisLeases:
    """A `LeaseService` on a Redis server.

    Parameters
    ----------
    url:
        ``redis://``, ``rediss://`` or ``unix://``, as redis-py takes it.
    seconds:
        What a start waits for the server at most.
    heartbeat:
        Seconds in which a holder renews its lease `RENEWALS_PER_HEARTBEAT` times.
    state:
        Folder for the circuit breaker's state.
    """

    def __init__(self, url: str, seconds: float, heartbeat: float, state: Path) -> None:
        self._url = url
        self._seconds = seconds
        self._expiry_ms = int(LOST_AFTER * heartbeat * 1000)
        parts = urlsplit(url)
        file = f"redis-{parts.hostname or 'unix'}-{parts.port or 6379}.json"
        self.budget = TimeBudget(seconds)
        self.breaker = Breaker(state / file, redact_url(url), self.budget, lambda text: redact(text, url, {}))
        self._client: Any = None

    def acquire(self, name: str) -> Grant | Busy:
        """See `LeaseService`."""
        owner = uuid.uuid4().hex
        arguments = [owner, self._expiry_ms, FORGET_SECONDS]
        mine, holder, other = self._run("acquiring a lease", _ACQUIRE, name, arguments)
        if not mine:
            return Busy(int(holder.split()[0]), f"{holder!r} {other}", expires=True)
        return Grant(name, int(holder), took_over=int(other) < int(holder) - 1, owner=owner)

    def take_over(self, name: str, token: int) -> Grant | None:
        """Nothing to do: the server lets the lease of a lost holder expire, and `acquire` gets it then."""
        return None

    def renew(self, grant: Grant) -> bool:
        """See `LeaseService`."""
        arguments = [grant.token, grant.owner, self._expiry_ms]
        return bool(self._run("renewing a lease", _RENEW, grant.name, arguments))

    def release(self, grant: Grant) -> None:
        """See `LeaseService`."""
        self._run("releasing a lease", _RELEASE, grant.name, [grant.token, grant.owner, FORGET_SECONDS])

    def _run(self, what: str, script: str, name: str, arguments: list[Any]) -> Any:
        # Braces: one slot of a cluster.
        keys = [f"ts_handlers:{{{name}}}:{kind}" for kind in ("lease", "token", "released")]

        def run(_: threading.Event) -> Any:
            if self._client is None:
                try:
                    import redis
                    from redis.backoff import NoBackoff
                    from redis.retry import Retry
                except ImportError as error:
                    raise UnusableError(
                        f"the package 'redis' cannot be imported ({error}); pip install 'ts-handlers[remote]'"
                    ) from error
                self._client = redis.Redis.from_url(
                    self._url,
                    socket_timeout=self._seconds,
                    socket_connect_timeout=self._seconds,
                    retry=Retry(NoBackoff(), 0),
                )
            return self._client.eval(script, len(keys), *keys, *arguments)

        return self.breaker.call(what, run)

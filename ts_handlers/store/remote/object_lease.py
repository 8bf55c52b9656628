"""Leases as objects of the remote store, where nothing but its exclusive create is atomic.

Objects below ``leases/<name>/``::

    <token>        made by exclusive create, by whoever acquires the lease: ten decimal digits; the greatest one counts
    <token>.sign   the holder's latest renewal: a number that changes with each one, or ``released``

To take a lease over is to create the next token. The greatest token is never removed, so tokens only grow.
"""

from __future__ import annotations

import re
import uuid

from ts_handlers.store.local.layout import LEASES
from ts_handlers.store.remote.base import Remote
from ts_handlers.store.remote.lease import Busy, Grant

_RELEASED = "released"
_RENEWAL_LIMIT = 64


class ObjectLeases:
    """A `LeaseService` on a `Remote` whose create is exclusive."""

    def __init__(self, remote: Remote) -> None:
        self._remote = remote
        self.budget = remote.budget

    def acquire(self, name: str) -> Grant | Busy:
        """See `LeaseService`."""
        tokens = self._tokens(name)
        if not tokens:
            grant = self._create(name, 1, took_over=False)
        else:
            renewal = self._renewal(name, tokens[-1])
            if renewal != _RELEASED:
                return Busy(tokens[-1], f"{tokens[-1]} {renewal}", expires=False)
            grant = self._create(name, tokens[-1] + 1, took_over=False)
        return grant or Busy(tokens[-1] + 1 if tokens else 1, "", expires=False)

    def take_over(self, name: str, token: int) -> Grant | None:
        """See `LeaseService`."""
        return self._create(name, token + 1, took_over=True)

    def renew(self, grant: Grant) -> bool:
        """See `LeaseService`."""
        if self._tokens(grant.name)[-1:] != [grant.token]:
            return False
        self._remote.put(self._path(grant.name, grant.token, ".sign"), uuid.uuid4().hex.encode())
        return True

    def release(self, grant: Grant) -> None:
        """See `LeaseService`."""
        self._remote.put(self._path(grant.name, grant.token, ".sign"), _RELEASED.encode())

    def _path(self, name: str, token: int, suffix: str = "") -> str:
        return f"{LEASES}/{name}/{token:010d}{suffix}"

    def _tokens(self, name: str) -> list[int]:
        found = self._remote.list(f"{LEASES}/{name}")
        return [int(item) for item in found if re.fullmatch(r"\d{10}", item)]

    def _renewal(self, name: str, token: int) -> str:
        path = self._path(name, token, ".sign")
        found = self._remote.get(path)
        return (found or b"")[:_RENEWAL_LIMIT].decode("ascii", "replace")

    def _create(self, name: str, token: int, took_over: bool) -> Grant | None:
        if not self._remote.create(self._path(name, token), b""):
            return None
        tokens = self._tokens(name)
        if tokens and tokens[-1] > token:  # this one was made and removed before, while this process was slow
            self._remote.delete(self._path(name, token))
            return None
        for old in tokens:
            if old < token:
                self._remote.delete(self._path(name, old, ".sign"))
                self._remote.delete(self._path(name, old))
        return Grant(name, token, took_over)

"""A lease with heartbeat, takeover and a fencing token, so that one host builds a key and the others wait for it.

A holder renews its lease `RENEWALS_PER_HEARTBEAT` times in each heartbeat. Nobody compares the clocks of two hosts: a
waiter measures with its own monotonic clock for how long it has seen no renewal, and a Redis server measures with its
own clock.

The loss of a holder (killed, stopped, or cut off) is *detectable* for a waiter when it has watched the lease for
`LOST_AFTER` heartbeats without a renewal, or when the Redis server has let the lease expire, which it does `LOST_AFTER`
heartbeats after the last renewal. The waiter polls `POLLS_PER_HEARTBEAT` times per heartbeat and takes over at
its first poll after that moment: within two heartbeats of the loss.

Each acquisition gets a token greater than every earlier one of the same name. A holder that has been taken over finds
that out when it confirms its token, and does not publish. It may also find out too late: the fence is the remote
store's exclusive create, which lets nobody replace an object.
"""

from __future__ import annotations

import dataclasses
import logging
import threading
import time
from collections.abc import Callable
from typing import Protocol

from ts_handlers.errors import StoreError
from ts_handlers.store.remote.budget import TimeBudget

logger = logging.getLogger(__name__)

LOST_AFTER = 1.25
"""Heartbeats without a renewal after which a holder counts as lost."""
RENEWALS_PER_HEARTBEAT = 4
POLLS_PER_HEARTBEAT = 4
LOG_EVERY_SECONDS = 10.0


@dataclasses.dataclass(frozen=True)
class Grant:
    """A lease that this process got.

    Attributes
    ----------
    name: of the lease.
    token: greater than every earlier one of the same name.
    took_over: whether the last holder had not released it.
    owner: a random name of this process, where the service may forget tokens.
    """

    name: str
    token: int
    took_over: bool = False
    owner: str = ""


@dataclasses.dataclass(frozen=True)
class Busy:
    """A lease that somebody else holds.

    Attributes
    ----------
    token: of the holder.
    renewal: a text that changes with each renewal.
    expires: whether the service itself ends the lease of a holder that is lost, so that nobody has to take it over.
    """

    token: int
    renewal: str
    expires: bool


class LeaseService(Protocol):
    """The service through which hosts agree that one of them builds a key.

    Every method raises `RemoteError` when the service does not answer in time; none waits for another host.
    """

    budget: TimeBudget
    """What the service may still cost a start."""

    def acquire(self, name: str) -> Grant | Busy:
        """Take a lease; `Busy` when somebody holds it."""

    def take_over(self, name: str, token: int) -> Grant | None:
        """Take the lease from a lost holder; None when somebody else was faster."""

    def renew(self, grant: Grant) -> bool:
        """Show that the holder lives; False when the lease has been taken over."""

    def release(self, grant: Grant) -> None:
        """Give the lease back, so that the next one need not wait."""


class HeldLease:
    """A lease that this process holds; a thread renews it until it is released.

    Parameters
    ----------
    service:
        Gave the lease.
    grant:
        What it gave.
    heartbeat:
        Seconds in which the lease is renewed `RENEWALS_PER_HEARTBEAT` times.
    """

    def __init__(self, service: LeaseService, grant: Grant, heartbeat: float) -> None:
        self.grant = grant
        self._service = service
        self._heartbeat = heartbeat
        self._lost = threading.Event()
        self._released = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="ts_handlers lease", daemon=True)
        self._thread.start()

    def _beat(self) -> None:
        while not self._released.wait(self._heartbeat / RENEWALS_PER_HEARTBEAT):
            if not self.confirm():
                logger.warning("the lease %s was taken over by another host", self.grant.name)
                return

    def confirm(self) -> bool:
        """Renew the lease; False when somebody has taken it over.

        A service that does not answer settles nothing, so the lease counts as held: what must not happen twice is
        guarded by the remote store's exclusive create.
        """
        if not self._lost.is_set():
            try:
                if not self._service.renew(self.grant):
                    self._lost.set()
            except StoreError as error:
                logger.debug("the lease %s could not be renewed: %s", self.grant.name, error)
        return not self._lost.is_set()

    def release(self) -> None:
        """Stop the heartbeat and give the lease back, unless it has been taken over."""
        self._released.set()
        self._thread.join(self._heartbeat)
        if self._lost.is_set():
            return
        try:
            self._service.release(self.grant)
        except StoreError as error:
            logger.debug("the lease %s could not be released and will expire: %s", self.grant.name, error)


def wait_for_lease(
    service: LeaseService,
    name: str,
    heartbeat: float,
    published: Callable[[], bool],
    report: Callable[[str], None] = lambda text: None,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> HeldLease | None:
    """Get a lease, and wait for its holder if there is one. Only the first question counts against the time budget.

    Parameters
    ----------
    heartbeat:
        Seconds in which a holder renews its lease `RENEWALS_PER_HEARTBEAT` times.
    published:
        Whether what the holder builds has appeared; it ends the wait.
    report:
        Gets a line for the log at the beginning of a wait and every ten seconds.

    Returns
    -------
    The lease, or None when the wait ended because `published` said so.

    Raises
    ------
    RemoteError
        The service does not answer.
    """
    interval = heartbeat / POLLS_PER_HEARTBEAT
    renewal, since, started = "", clock(), clock()
    told: float | None = None
    with service.budget.counting():
        found = service.acquire(name)
    while True:
        now = clock()
        if isinstance(found, Busy):
            if found.renewal != renewal:
                renewal, since = found.renewal, now
            elif not found.expires and now - since >= LOST_AFTER * heartbeat:
                logger.warning("the holder of %s was not heard of for %.1f s; taking over", name, now - since)
                taken = service.take_over(name, found.token)
                if taken is not None:
                    return HeldLease(service, taken, heartbeat)
        else:
            return HeldLease(service, found, heartbeat)
        if told is None or now - told >= LOG_EVERY_SECONDS:
            told = now
            report(f"another host builds it; waited {now - started:.0f} s")
        if published():
            return None
        sleep(interval)
        found = service.acquire(name)

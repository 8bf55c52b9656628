"""Leases among hosts: one holder, growing tokens, takeover without comparing clocks."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import pytest

from tests.store.conftest import PATIENT_SECONDS
from tests.support.tcp_proxy import Proxy
from tests.support.workers import wait_until
from ts_handlers.errors import RemoteError
from ts_handlers.settings.sections import RemoteSettings
from ts_handlers.store.remote import lease as remote_lease
from ts_handlers.store.remote.budget import TimeBudget
from ts_handlers.store.remote.lease import (
    LOST_AFTER,
    POLLS_PER_HEARTBEAT,
    Busy,
    Grant,
    HeldLease,
    LeaseService,
    wait_for_lease,
)
from ts_handlers.store.remote.object_lease import ObjectLeases
from ts_handlers.store.remote.objects import RemoteObjects
from ts_handlers.store.remote.redis_lease import RedisLeases

PATIENT = 600.0
"""A heartbeat, in seconds: what is not renewed meanwhile is not lost, however busy the machine is."""
HEARTBEAT = 2.0
"""Where leases are really lost and kept."""


class Host(Protocol):
    """Makes the lease service as the host of this name has it."""

    def __call__(self, name: str, heartbeat: float = PATIENT) -> LeaseService: ...


@pytest.fixture(params=["folder", "s3", pytest.param("redis", marks=pytest.mark.services)])
def host(request: pytest.FixtureRequest, tmp_path: Path) -> Host:
    if request.param == "redis":
        url: str = request.getfixturevalue("redis_url")
        return lambda name, heartbeat=PATIENT: RedisLeases(url, PATIENT_SECONDS, heartbeat, tmp_path / name)
    settings: RemoteSettings = request.getfixturevalue(request.param)
    return lambda name, heartbeat=PATIENT: ObjectLeases(RemoteObjects(settings, tmp_path / name))


@pytest.fixture
def expire(request: pytest.FixtureRequest, host: Host) -> Callable[[str], object]:
    """Does to a lease what time does to one whose holder is lost: Redis forgets it; objects stay."""
    if not isinstance(host("anybody"), RedisLeases):
        return lambda name: None
    import redis

    client = redis.Redis(port=request.getfixturevalue("redis_port"))
    return lambda name: client.delete(f"ts_handlers:{{{name}}}:lease")


def acquired(found: Grant | Busy | None) -> Grant:
    assert isinstance(found, Grant)
    return found


def take_over(service: LeaseService, name: str) -> Grant:
    """Take a lease that has expired, or that nobody has renewed for long enough."""
    found = service.acquire(name)
    return found if isinstance(found, Grant) else acquired(service.take_over(name, found.token))


def test_one_holder_and_growing_tokens(host: Host) -> None:
    a, b = host("a"), host("b")
    first = acquired(a.acquire("key"))
    busy = b.acquire("key")
    assert isinstance(busy, Busy)
    assert busy.token == first.token
    assert isinstance(a.acquire("key"), Busy)  # not even by the same host
    other = acquired(b.acquire("other key"))
    assert a.renew(first)
    a.release(first)
    second = acquired(b.acquire("key"))
    assert second.token > first.token
    assert not first.took_over
    assert not second.took_over
    assert b.renew(other)


def test_token_that_was_used_and_removed_before_is_no_lease(
    folder: RemoteSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A host that looked, was stopped, and goes on when others have held the lease in turn."""
    slow, first, second = (ObjectLeases(RemoteObjects(folder, tmp_path / name)) for name in ("slow", "first", "second"))
    look, stale = slow._tokens, [[]]
    monkeypatch.setattr(
        slow, "_tokens", lambda *arguments, **options: stale.pop() if stale else look(*arguments, **options)
    )
    first.release(acquired(first.acquire("key")))
    held = acquired(second.acquire("key"))
    assert isinstance(slow.acquire("key"), Busy)
    assert stale == []
    assert second.renew(held)


def test_holder_that_was_taken_over_finds_out(host: Host, expire: Callable[[str], object]) -> None:
    a, b = host("a"), host("b")
    first = acquired(a.acquire("key"))
    expire("key")
    second = take_over(b, "key")
    assert second.token > first.token
    assert second.took_over
    assert not a.renew(first)
    a.release(first)  # gives back nothing that it does not hold
    assert b.renew(second)
    assert isinstance(a.acquire("key"), Busy)


def test_one_of_many_waiters_takes_over(host: Host) -> None:
    acquired(host("lost").acquire("key"))
    grants: list[Grant] = []
    barrier = threading.Barrier(4)

    def wait(service: LeaseService) -> None:
        busy = service.acquire("key")
        barrier.wait()
        if isinstance(busy, Busy):
            taken = service.take_over("key", busy.token)
            if taken is not None:
                grants.append(taken)

    threads = [threading.Thread(target=wait, args=(host(str(number)),)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    expires = isinstance(host("x"), RedisLeases)  # the server's expiry decides there, and nobody takes over
    assert len(grants) == (0 if expires else 1)


def test_each_renewal_can_be_told_from_the_last(remote_settings: RemoteSettings, tmp_path: Path) -> None:
    a, b = (ObjectLeases(RemoteObjects(remote_settings, tmp_path / name)) for name in "ab")
    grant = acquired(a.acquire("key"))
    renewals = set()
    for _ in range(4):
        busy = b.acquire("key")
        assert isinstance(busy, Busy)
        renewals.add(busy.renewal)
        assert a.renew(grant)
    assert len(renewals) == 4


def test_held_lease_outlives_many_expiries_until_it_is_released(host: Host) -> None:
    a, b = host("a", HEARTBEAT), host("b", HEARTBEAT)
    held = wait_for_lease(a, "key", HEARTBEAT, lambda: False)
    assert held is not None
    waits: list[str] = []
    got: list[HeldLease | None] = []

    def wait() -> None:
        got.append(wait_for_lease(b, "key", HEARTBEAT, lambda: False, waits.append))

    thread = threading.Thread(target=wait)
    thread.start()
    time.sleep(1.5 * LOST_AFTER * HEARTBEAT)
    assert held.confirm()
    assert got == []
    held.release()
    thread.join()
    assert got[0] is not None
    assert not got[0].grant.took_over
    assert "another host builds it" in waits[0]
    got[0].release()


def test_wait_ends_when_the_entry_appears(host: Host) -> None:
    held = wait_for_lease(host("a"), "key", PATIENT, lambda: False)
    answers = iter([False, False, True])
    naps: list[float] = []
    assert wait_for_lease(host("b"), "key", PATIENT, lambda: next(answers), sleep=naps.append) is None
    assert naps == [PATIENT / POLLS_PER_HEARTBEAT] * 2
    assert held is not None
    held.release()


class Lost:
    """A service whose holder renews its lease until it does not; nobody's clock but the waiter's exists."""

    def __init__(self, renewals: int, expires: bool = False) -> None:
        self.budget = TimeBudget(30.0)
        self.acquisitions = 0
        self.renewals = renewals
        self.expires = expires
        self.taken: list[int] = []

    def acquire(self, name: str) -> Grant | Busy:
        self.acquisitions += 1
        return Busy(7, str(min(self.acquisitions, self.renewals)), self.expires)

    def take_over(self, name: str, token: int) -> Grant | None:
        self.taken.append(self.acquisitions)
        return Grant(name, token + 1, took_over=True)

    def renew(self, grant: Grant) -> bool:
        return True

    def release(self, grant: Grant) -> None:
        pass


@pytest.mark.parametrize("renewals", [1, 9, 40])
@pytest.mark.parametrize("skew", [0.0, -1e6, 1e6])
def test_takeover_follows_at_the_first_poll_after_the_loss_is_detectable(
    renewals: int, skew: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr(remote_lease.time, "time", lambda: now[0] + skew)
    service = Lost(renewals)
    held = wait_for_lease(
        service, "key", 5.0, lambda: False, clock=lambda: now[0], sleep=lambda s: now.__setitem__(0, now[0] + s)
    )
    assert held is not None
    held.release()
    polls_of_silence = int(LOST_AFTER * POLLS_PER_HEARTBEAT)
    assert service.taken == [renewals + polls_of_silence]  # not one poll later: within a quarter of a heartbeat


def test_expiring_leases_are_left_to_their_service() -> None:
    now, service = [0.0], Lost(1, expires=True)
    end = lambda: service.acquisitions >= 100  # noqa: E731
    sleep: Callable[[float], Any] = lambda s: now.__setitem__(0, now[0] + s)  # noqa: E731
    assert wait_for_lease(service, "key", 5.0, end, clock=lambda: now[0], sleep=sleep) is None
    assert service.taken == []


def test_redis_that_forgets_everything_gives_no_lease_twice(redis_url: str, redis_port: int, tmp_path: Path) -> None:
    import redis

    a, b = (RedisLeases(redis_url, PATIENT_SECONDS, PATIENT, tmp_path / name) for name in "ab")
    first = acquired(a.acquire("key"))
    redis.Redis(port=redis_port).flushall()
    second = acquired(b.acquire("key"))
    assert second.token == first.token  # the count is lost, the owners' names are not
    assert not a.renew(first)
    a.release(first)
    assert b.renew(second)


def test_dead_and_silent_redis_cost_one_timeout(tmp_path: Path) -> None:
    pytest.importorskip("redis", reason="redis-py is not installed")
    with Proxy(mode="swallow") as silent:
        service = RedisLeases(f"redis://:secret@127.0.0.1:{silent.port}/0", 0.3, 5.0, tmp_path)
        for _ in range(3):
            with pytest.raises(RemoteError, match=rf"redis://127\.0\.0\.1:{silent.port}/0") as caught:
                service.acquire("key")
            assert "secret" not in str(caught.value)
            assert wait_until(lambda: silent.connections == 1)  # by a thread that nobody waits for any more
    dead = RedisLeases("redis://127.0.0.1:1/0", PATIENT_SECONDS, 5.0, tmp_path)
    with pytest.raises(RemoteError, match="ConnectionError"):
        dead.acquire("key")


def test_holder_that_is_cut_off_is_taken_over_and_does_not_know_before_it_asks(
    redis_url: str, redis_port: int, tmp_path: Path
) -> None:
    with Proxy(("127.0.0.1", redis_port)) as proxy:
        a = RedisLeases(f"redis://127.0.0.1:{proxy.port}/0", PATIENT_SECONDS, HEARTBEAT, tmp_path / "a")
        held = wait_for_lease(a, "key", HEARTBEAT, lambda: False)
        assert held is not None
        proxy.cut()
        taken = wait_for_lease(
            RedisLeases(redis_url, PATIENT_SECONDS, HEARTBEAT, tmp_path / "b"), "key", HEARTBEAT, lambda: False
        )
        assert taken is not None
        assert taken.grant.took_over
        assert taken.grant.token > held.grant.token
        assert taken.confirm()
        held.release()
        taken.release()

"""Leases among hosts: one holder, growing tokens, takeover without comparing clocks."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.tcp_proxy import Proxy
from ts_handlers.errors import RemoteError
from ts_handlers.settings.sections import RemoteSettings
from ts_handlers.store.remote import lease as remote_lease
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
from ts_handlers.store.remote.objects import Remote
from ts_handlers.store.remote.redis_lease import RedisLeases

HEARTBEAT = 1.0
Host = Callable[[str], LeaseService]


@pytest.fixture(params=["folder", "s3", pytest.param("redis", marks=pytest.mark.services)])
def host(request: pytest.FixtureRequest, tmp_path: Path) -> Host:
    """Makes the lease service as another host has it."""
    if request.param == "redis":
        url: str = request.getfixturevalue("redis_url")
        return lambda name: RedisLeases(url, 30.0, HEARTBEAT, tmp_path / name)
    settings: RemoteSettings = request.getfixturevalue(request.param)
    return lambda name: ObjectLeases(Remote(settings, tmp_path / name))


def acquired(found: Grant | Busy | None) -> Grant:
    assert isinstance(found, Grant)
    return found


def take_over(service: LeaseService, name: str) -> Grant:
    """Take a lease from a holder that shows no sign of life."""
    while True:
        found = service.acquire(name, charged=False)
        if isinstance(found, Grant):
            return found
        if not found.expires:
            return acquired(service.take_over(name, found.token))
        time.sleep(0.05)


def test_one_holder_and_growing_tokens(host: Host) -> None:
    a, b = host("a"), host("b")
    first = acquired(a.acquire("key", charged=True))
    busy = b.acquire("key", charged=True)
    assert isinstance(busy, Busy)
    assert busy.token == first.token
    assert isinstance(a.acquire("key", charged=True), Busy)  # not even by the same host
    other = acquired(b.acquire("other key", charged=True))
    assert a.renew(first)
    a.release(first)
    second = acquired(b.acquire("key", charged=True))
    assert second.token > first.token
    assert not first.took_over
    assert not second.took_over
    assert b.renew(other)


def test_token_that_was_used_and_removed_before_is_no_lease(
    folder: RemoteSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A host that looked, was stopped, and goes on when others have held the lease in turn."""
    slow, first, second = (ObjectLeases(Remote(folder, tmp_path / name)) for name in ("slow", "first", "second"))
    look, stale = slow._tokens, [[]]
    monkeypatch.setattr(
        slow, "_tokens", lambda *arguments, **options: stale.pop() if stale else look(*arguments, **options)
    )
    first.release(acquired(first.acquire("key", charged=True)))
    held = acquired(second.acquire("key", charged=True))
    assert isinstance(slow.acquire("key", charged=True), Busy)
    assert stale == []
    assert second.renew(held)


def test_holder_that_was_taken_over_finds_out(host: Host) -> None:
    a, b = host("a"), host("b")
    first = acquired(a.acquire("key", charged=True))
    second = take_over(b, "key")
    assert second.token > first.token
    assert second.took_over
    assert not a.renew(first)
    a.release(first)  # gives back nothing that it does not hold
    assert b.renew(second)
    assert isinstance(a.acquire("key", charged=True), Busy)


def test_one_of_many_waiters_takes_over(host: Host) -> None:
    acquired(host("lost").acquire("key", charged=True))
    grants: list[Grant] = []
    barrier = threading.Barrier(4)

    def wait(service: LeaseService) -> None:
        busy = service.acquire("key", charged=True)
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


def test_sign_of_life_changes_with_each_renewal(remote_settings: RemoteSettings, tmp_path: Path) -> None:
    a, b = (ObjectLeases(Remote(remote_settings, tmp_path / name)) for name in "ab")
    grant = acquired(a.acquire("key", charged=True))
    signs = set()
    for _ in range(4):
        busy = b.acquire("key", charged=True)
        assert isinstance(busy, Busy)
        signs.add(busy.sign)
        assert a.renew(grant)
    assert len(signs) == 4


def test_held_lease_outlives_many_expiries_until_it_is_released(host: Host) -> None:
    a, b = host("a"), host("b")
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
    held = wait_for_lease(host("a"), "key", HEARTBEAT, lambda: False)
    answers = iter([False, False, True])
    assert wait_for_lease(host("b"), "key", HEARTBEAT, lambda: next(answers)) is None
    assert held is not None
    held.release()


class Lost:
    """A service whose holder shows signs of life until it does not; nobody's clock but the waiter's exists."""

    def __init__(self, signs: int, expires: bool = False) -> None:
        self.acquisitions = 0
        self.signs = signs
        self.expires = expires
        self.taken: list[int] = []

    def acquire(self, name: str, charged: bool) -> Grant | Busy:
        self.acquisitions += 1
        return Busy(7, str(min(self.acquisitions, self.signs)), self.expires)

    def take_over(self, name: str, token: int) -> Grant | None:
        self.taken.append(self.acquisitions)
        return Grant(name, token + 1, took_over=True)

    def renew(self, grant: Grant) -> bool:
        return True

    def release(self, grant: Grant) -> None:
        pass


@pytest.mark.parametrize("signs", [1, 9, 40])
@pytest.mark.parametrize("skew", [0.0, -1e6, 1e6])
def test_takeover_follows_at_the_first_poll_after_the_loss_is_detectable(
    signs: int, skew: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr(remote_lease.time, "time", lambda: now[0] + skew)
    service = Lost(signs)
    held = wait_for_lease(
        service, "key", 5.0, lambda: False, clock=lambda: now[0], sleep=lambda s: now.__setitem__(0, now[0] + s)
    )
    assert held is not None
    held.release()
    polls_of_silence = int(LOST_AFTER * POLLS_PER_HEARTBEAT)
    assert service.taken == [signs + polls_of_silence]  # not one poll later: within a quarter of a heartbeat


def test_expiring_leases_are_left_to_their_service() -> None:
    now, service = [0.0], Lost(1, expires=True)
    end = lambda: service.acquisitions >= 100  # noqa: E731
    sleep: Callable[[float], Any] = lambda s: now.__setitem__(0, now[0] + s)  # noqa: E731
    assert wait_for_lease(service, "key", 5.0, end, clock=lambda: now[0], sleep=sleep) is None
    assert service.taken == []


def test_redis_that_forgets_everything_gives_no_lease_twice(redis_url: str, redis_port: int, tmp_path: Path) -> None:
    import redis

    a, b = (RedisLeases(redis_url, 30.0, 60.0, tmp_path / name) for name in "ab")
    first = acquired(a.acquire("key", charged=True))
    redis.Redis(port=redis_port).flushall()
    second = acquired(b.acquire("key", charged=True))
    assert second.token == first.token  # the count is lost, the owners' names are not
    assert not a.renew(first)
    a.release(first)
    assert b.renew(second)


def test_dead_and_silent_redis_cost_one_timeout(tmp_path: Path) -> None:
    with Proxy(mode="swallow") as silent:
        service = RedisLeases(f"redis://:secret@127.0.0.1:{silent.port}/0", 0.3, 5.0, tmp_path)
        for _ in range(3):
            with pytest.raises(RemoteError, match=rf"redis://127\.0\.0\.1:{silent.port}/0") as caught:
                service.acquire("key", charged=True)
            assert "secret" not in str(caught.value)
        assert silent.connections == 1
    dead = RedisLeases("redis://127.0.0.1:1/0", 30.0, 5.0, tmp_path)
    with pytest.raises(RemoteError, match="ConnectionError"):
        dead.acquire("key", charged=True)


def test_holder_that_is_cut_off_is_taken_over_and_does_not_know_before_it_asks(
    redis_url: str, redis_port: int, tmp_path: Path
) -> None:
    with Proxy(("127.0.0.1", redis_port)) as proxy:
        a = RedisLeases(f"redis://127.0.0.1:{proxy.port}/0", 30.0, HEARTBEAT, tmp_path / "a")
        held = wait_for_lease(a, "key", HEARTBEAT, lambda: False)
        assert held is not None
        proxy.cut()
        taken = wait_for_lease(RedisLeases(redis_url, 30.0, HEARTBEAT, tmp_path / "b"), "key", HEARTBEAT, lambda: False)
        assert taken is not None
        assert taken.grant.took_over
        assert taken.grant.token > held.grant.token
        assert taken.confirm()
        held.release()
        taken.release()

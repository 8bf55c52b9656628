"""Answers that hosts share through a real Redis server, and what happens when that does not answer."""

from __future__ import annotations

import logging
import socket
import sys
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from tests.result_cache.test_cache import PATIENT_SECONDS, Counts, computing, key, told
from ts_handlers.result_cache.base import Computed
from ts_handlers.result_cache.cache import ResultCache
from ts_handlers.result_cache.redis_tier import RedisTier
from ts_handlers.store.remote.base import UnusableError

TTL = 600.0


def make_tier(url: str, counts: Counts, **options: Any) -> RedisTier:
    return RedisTier(
        **{"url": url, "timeout": PATIENT_SECONDS, "ttl": TTL, "max_bytes": 1 << 20, **options}, count=counts
    )


def make_host(url: str, counts: Counts, **options: Any) -> ResultCache:
    """The cache of a host of its own."""
    return ResultCache(1 << 20, TTL, PATIENT_SECONDS, counts, make_tier(url, counts, **options))


def stored_bytes(value: bytes) -> Any:
    return lambda indexes: [Computed(value, value, len(value)) for _ in indexes]


def client(url: str) -> Any:
    import redis

    return redis.Redis.from_url(url)


def name(of: object) -> str:
    return f"ts_handlers:result:{key(of).hex()}"


def test_no_request_waits_for_the_import_of_the_client(redis_url: str) -> None:
    assert make_tier(redis_url, Counts())._client is not None


def test_without_the_clients_package_the_tier_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "redis", None)
    with pytest.raises(UnusableError, match=r"ts-handlers\[remote\]"):
        make_tier("redis://127.0.0.1:1/0", Counts())


def test_another_host_finds_an_answer_and_keeps_it_for_itself(redis_url: str) -> None:
    first, second = Counts(), Counts()
    assert told(make_host(redis_url, first).answer([key("a")], stored_bytes(b"A"))) == [(b"A", "miss")]
    host = make_host(redis_url, second)
    answers = host.answer([key("a"), key("b"), key("a")], stored_bytes(b"B"))
    assert told(answers) == [(b"A", "hit"), (b"B", "miss"), (b"A", "hit")]
    assert told(host.answer([key("a")], stored_bytes(b"C"))) == [(b"A", "hit")]
    assert (second["remote_hit"], second["remote_miss"], host.stats().entries) == (1, 1, 2)
    assert 0 < client(redis_url).pttl(name("a")) <= TTL * 1000


def test_the_age_counts_from_when_the_answer_was_computed(redis_url: str) -> None:
    make_host(redis_url, Counts()).answer([key("a")], stored_bytes(b"A"))
    client(redis_url).pexpire(name("a"), 100_000)  # as if 500 s had gone by
    host = make_host(redis_url, Counts())
    ages = [host.answer([key("a")], stored_bytes(b"B"))[0].age for _ in range(2)]
    assert all(499 < age < TTL for age in ages)


def test_an_answer_that_is_kept_longer_elsewhere_is_none_here(redis_url: str) -> None:
    make_host(redis_url, Counts()).answer([key("a")], stored_bytes(b"A"))
    counts = Counts()
    host = make_host(redis_url, counts, ttl=1.0)
    assert told(host.answer([key("a")], stored_bytes(b"B"))) == [(b"B", "miss")]
    assert counts["remote_refused"] == 0


@pytest.mark.parametrize("damage", ["flipped", "cut", "of another key", "without an end", "of another kind", "foreign"])
def test_a_value_that_must_not_be_used_is_counted_and_replaced(damage: str, redis_url: str) -> None:
    make_host(redis_url, Counts()).answer(
        [key("a"), key("b")], lambda each: [Computed(b"A" * 9, b"A" * 9, 9) for _ in each]
    )
    redis = client(redis_url)
    value = redis.get(name("a"))
    assert isinstance(value, bytes)
    redis.delete(name("a"))
    if damage == "of another kind":
        redis.rpush(name("a"), "x")
        redis.pexpire(name("a"), 1000_000)
    else:
        bad = {
            "flipped": value[:-1] + b"B",
            "cut": value[:-1],
            "of another key": redis.get(name("b")),
            "without an end": value,
            "foreign": b"x" * 10_000,
        }[damage]
        redis.set(name("a"), bad, px=None if damage == "without an end" else 100_000)
    counts = Counts()
    host = make_host(redis_url, counts)
    assert told(host.answer([key("a"), key("b")], stored_bytes(b"new"))) == [(b"new", "miss"), (b"A" * 9, "hit")]
    assert (counts["remote_refused"], counts["remote_failed"]) == (1, 0)
    assert told(make_host(redis_url, Counts()).answer([key("a")], stored_bytes(b"x"))) == [(b"new", "hit")]


def test_a_value_that_is_larger_than_the_cache_is_not_fetched(redis_url: str) -> None:
    make_host(redis_url, Counts()).answer([key("a")], stored_bytes(b"A" * 100_000))
    counts = Counts()
    assert make_tier(redis_url, counts, max_bytes=1000).get([key("a")]) == {}
    assert counts["remote_refused"] == 1


def test_requests_that_ask_for_a_new_answer_do_not_ask_the_server(redis_url: str) -> None:
    make_host(redis_url, Counts()).answer([key("a")], stored_bytes(b"A"))
    host = make_host(redis_url, Counts())
    assert told(host.answer([key("a")], stored_bytes(b"B"), refresh={0})) == [(b"B", "miss")]
    assert told(make_host(redis_url, Counts()).answer([key("a")], stored_bytes(b"C"))) == [(b"B", "hit")]


@pytest.fixture
def silent() -> Iterator[tuple[int, list[Any]]]:
    """A server that takes connections and says nothing; its port, and the connections."""
    taken: list[Any] = []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def take() -> None:
            while True:
                try:
                    taken.append(server.accept()[0])
                except OSError:
                    return

        threading.Thread(target=take, daemon=True).start()
        yield server.getsockname()[1], taken
    for each in taken:
        each.close()


def test_a_server_that_does_not_answer_costs_one_request_its_timeout(
    silent: tuple[int, list[Any]], caplog: pytest.LogCaptureFixture
) -> None:
    port, taken = silent
    counts = Counts()
    host = make_host(f"redis://:password@127.0.0.1:{port}/0", counts, timeout=0.05)
    with caplog.at_level(logging.WARNING):
        for number in range(20):
            assert told(host.answer([key(number)], stored_bytes(b"A"))) == [(b"A", "miss")]
            assert told(host.answer([key(number)], stored_bytes(b"B"))) == [(b"A", "hit")]
    assert (counts["remote_failed"], len(taken)) == (20, 1)
    assert len(caplog.records) == 1
    assert "password" not in caplog.text
    shown = host.describe()["shared"]
    assert "no answer" in shown["reason"] or "Timeout" in shown["reason"]
    assert "password" not in str(shown)


def test_a_server_that_is_not_there_is_gone_on_without() -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    counts = Counts()
    host = make_host(f"redis://127.0.0.1:{port}/0", counts)
    assert told(host.answer([key("a"), key("b")], computing("A"))) == [("A", "miss"), ("A", "miss")]
    assert counts["remote_failed"] == 2


def test_a_full_server_is_counted_and_answers_go_on(redis_url: str) -> None:
    redis = client(redis_url)
    redis.config_set("maxmemory", "1")
    try:
        counts = Counts()
        host = make_host(redis_url, counts)
        for number in range(3):
            assert told(host.answer([key(number)], stored_bytes(b"A"))) == [(b"A", "miss")]
        assert counts["remote_failed"] == 3
        assert host.describe()["shared"]["reason"] is None
    finally:
        redis.config_set("maxmemory", "0")


def test_threads_of_two_hosts_get_the_right_answers(redis_url: str) -> None:
    hosts = [make_host(redis_url, Counts()) for _ in range(2)]
    wrong: list[Any] = []

    def ask(thread: int) -> None:
        for number in range(40):
            wanted = [(thread + number) % 25, number % 25]

            def compute(indexes: Sequence[int], wanted: list[int] = wanted) -> list[Computed]:
                return [Computed(b"%d" % wanted[index], b"%d" % wanted[index], 2) for index in indexes]

            answers = hosts[thread % 2].answer([key(each) for each in wanted], compute)
            wrong.extend(each for each, of in zip(answers, wanted, strict=True) if each.value != b"%d" % of)

    threads = [threading.Thread(target=ask, args=(thread,)) for thread in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []

"""The result cache: its bounds, equal requests under way, and that nothing stale or foreign is answered."""

from __future__ import annotations

import collections
import random
import threading
import tracemalloc
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from ts_handlers.metrics import COUNTERS
from ts_handlers.result_cache.base import Answered, Computed
from ts_handlers.result_cache.cache import ResultCache
from ts_handlers.result_cache.keys import KeyDigest
from ts_handlers.result_cache.lru import OVERHEAD_BYTES, ByteLRU

PATIENT_SECONDS = 120.0


class Counts(collections.Counter[str]):
    """Counters of a cache; those that are not declared fail."""

    def __call__(self, name: str, amount: int) -> None:
        assert name in COUNTERS
        self[name.removeprefix("result_cache_")] += amount


class Clock:
    """Seconds that a test sets."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def key(name: object) -> bytes:
    return KeyDigest(str(name).encode()).key()


def make(
    counts: Counts,
    *,
    max_bytes: int = 1 << 20,
    ttl: float = 60.0,
    wait_seconds: float = PATIENT_SECONDS,
    clock: Callable[[], float] | None = None,
) -> ResultCache:
    more: dict[str, Any] = {} if clock is None else {"clock": clock}
    return ResultCache(max_bytes, ttl, wait_seconds, counts, **more)


def computing(value: str, calls: list[Sequence[int]] | None = None) -> Callable[[Sequence[int]], list[Computed]]:
    def compute(indexes: Sequence[int]) -> list[Computed]:
        if calls is not None:
            calls.append(list(indexes))
        return [Computed(value, value, len(value)) for _ in indexes]

    return compute


def told(answers: Sequence[Answered]) -> list[tuple[Any, str]]:
    return [(each.value, each.how) for each in answers]


def test_the_bound_in_bytes_is_never_exceeded_and_the_least_recently_used_goes_first() -> None:
    counts = Counts()
    lru = ByteLRU(3 * (OVERHEAD_BYTES + 100), 60.0, counts)
    for name in "abc":
        assert lru.put(key(name), name, 100)
    assert lru.get(key("a")) is not None
    assert lru.put(key("d"), "d", 101)  # one byte more than there is room for beside two
    assert [lru.get(key(name)) is not None for name in "abcd"] == [True, False, False, True]
    assert (lru.bytes, counts["evicted"]) == (2 * OVERHEAD_BYTES + 201, 2)


def test_the_bound_holds_in_any_order_of_operations() -> None:
    draw = random.Random(0)
    clock, counts = Clock(), Counts()
    lru = ByteLRU(20_000, 10.0, counts, clock)
    sizes: dict[bytes, int] = {}
    for _ in range(5000):
        clock.now += draw.random()
        name = key(draw.randrange(40))
        if draw.random() < 0.5:
            size = draw.randrange(6000)
            if lru.put(name, size, size, age=draw.choice([0.0, 0.0, 5.0, 11.0])):
                sizes[name] = size
        elif (entry := lru.get(name)) is not None:
            assert entry.value == sizes[name]
            assert entry.computed <= clock.now < entry.ends
        assert lru.bytes <= 20_000
        assert lru.bytes == sum(entry.size for entry in lru._entries.values())
        assert set(lru._entries) == set(lru._by_age)
    assert counts["evicted"] > 100
    assert counts["expired"] > 100


def test_the_declared_overhead_of_an_entry_is_what_it_takes() -> None:
    entries = 20_000
    lru = ByteLRU(1 << 30, 60.0, Counts())
    tracemalloc.start()
    try:
        for number in range(entries):
            value = number.to_bytes(100, "little")
            lru.put(key(number), value, len(value))
        taken = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert len(lru) == entries
    assert 0.5 * lru.bytes < taken <= lru.bytes


def test_an_answer_that_is_larger_than_the_cache_is_given_and_not_stored() -> None:
    counts = Counts()
    cache = make(counts, max_bytes=OVERHEAD_BYTES + 5)
    for _ in range(2):
        assert told(cache.answer([key("a")], computing("too large"))) == [("too large", "miss")]
    assert told(cache.answer([key("b")], computing("small"))) == [("small", "miss")]
    assert told(cache.answer([key("b")], computing("other"))) == [("small", "hit")]
    assert (counts["oversize"], cache.stats().entries) == (2, 1)


def test_an_answer_ends_with_its_time_and_says_its_age() -> None:
    clock, counts = Clock(), Counts()
    cache = make(counts, ttl=10.0, clock=clock)
    cache.answer([key("a")], computing("first"))
    clock.now = 9.5
    (answered,) = cache.answer([key("a")], computing("second"))
    assert (answered.value, answered.how, answered.age) == ("first", "hit", 9.5)
    clock.now = 10.0
    assert told(cache.answer([key("a")], computing("second"))) == [("second", "miss")]
    assert counts["expired"] == 1


def test_what_has_ended_gives_its_room_back_although_nobody_asks_for_it() -> None:
    clock, counts = Clock(), Counts()
    lru = ByteLRU(1 << 20, 10.0, counts, clock)
    for number in range(50):
        lru.put(key(number), number, 100)
    clock.now = 10.0
    lru.put(key("new"), "new", 100)
    assert (len(lru), lru.bytes, counts["expired"]) == (1, OVERHEAD_BYTES + 100, 50)


def test_in_a_batch_hits_are_answered_duplicates_computed_once_and_the_rest_runs() -> None:
    counts, calls = Counts(), list[Sequence[int]]()
    cache = make(counts)
    cache.answer([key("stored")], computing("old"))
    keys = [key("new"), key("stored"), None, key("new"), key("other")]
    answers = cache.answer(keys, computing("new", calls))
    assert told(answers) == [("new", "miss"), ("old", "hit"), ("new", "bypass"), ("new", "coalesced"), ("new", "miss")]
    assert calls == [[0, 2, 4]]
    assert [counts[name] for name in ("hit", "miss", "coalesced", "bypass")] == [1, 3, 1, 1]
    assert cache.stats().entries == 3


def test_who_asks_for_a_new_answer_gets_one_that_replaces_the_stored_one() -> None:
    cache = make(Counts())
    cache.answer([key("a")], computing("old"))
    assert told(cache.answer([key("a")], computing("new"), refresh={0})) == [("new", "miss")]
    assert told(cache.answer([key("a")], computing("newer"))) == [("new", "hit")]


def test_an_answer_that_is_not_one_for_all_is_computed_for_each() -> None:
    counts, calls = Counts(), list[Sequence[int]]()
    cache = make(counts)

    def compute(indexes: Sequence[int]) -> list[Computed]:
        calls.append(list(indexes))
        return [Computed(f"of {index}", shared=False) for index in indexes]

    answers = cache.answer([key("a"), key("a"), key("a")], compute)
    assert told(answers) == [("of 0", "miss"), ("of 1", "bypass"), ("of 2", "bypass")]
    assert calls == [[0], [1, 2]]
    assert cache.stats().entries == 0


class Slow:
    """Computes when it is told to, and counts how often."""

    def __init__(self, value: str = "slow", error: BaseException | None = None) -> None:
        self.began, self.goes_on = threading.Event(), threading.Event()
        self.calls = 0
        self._value, self._error = value, error

    def __call__(self, indexes: Sequence[int]) -> list[Computed]:
        self.calls += 1
        self.began.set()
        assert self.goes_on.wait(PATIENT_SECONDS)
        if self._error is not None:
            raise self._error
        return [Computed(self._value, self._value, 4) for _ in indexes]


def in_threads(*functions: Callable[[], Any]) -> tuple[list[threading.Thread], list[Any]]:
    results: list[Any] = [None] * len(functions)

    def run(index: int) -> None:
        try:
            results[index] = functions[index]()
        except BaseException as error:
            results[index] = error

    threads = [threading.Thread(target=run, args=(index,), daemon=True) for index in range(len(functions))]
    for thread in threads:
        thread.start()
    return threads, results


def join(threads: list[threading.Thread]) -> None:
    for thread in threads:
        thread.join(PATIENT_SECONDS)
        assert not thread.is_alive()


def wait_for_waiters(cache: ResultCache, name: bytes, count: int) -> None:
    """Until so many threads wait for a computation."""
    done = cache._under_way[name].done
    while len(done._cond._waiters) < count:  # type: ignore[attr-defined]
        threading.Event().wait(0.001)


def led_and_followed(cache: ResultCache, slow: Slow, followers: int) -> tuple[list[Any], list[Any]]:
    """What the request gets that computes, and what so many equal ones get that come meanwhile."""
    first, led = in_threads(lambda: cache.answer([key("a")], slow))
    assert slow.began.wait(PATIENT_SECONDS)
    others, followed = in_threads(*[lambda: cache.answer([key("a")], slow)] * followers)
    wait_for_waiters(cache, key("a"), followers)
    slow.goes_on.set()
    join(first + others)
    return led, followed


def test_equal_requests_under_way_are_computed_once() -> None:
    counts, slow = Counts(), Slow()
    cache = make(counts)
    led, followed = led_and_followed(cache, slow, 7)
    assert [told(each) for each in led] == [[("slow", "miss")]]
    assert [told(each) for each in followed] == [[("slow", "coalesced")]] * 7
    assert (slow.calls, counts["coalesced"], cache.stats().under_way) == (1, 7, 0)


def test_an_error_goes_to_all_who_wait_and_is_never_stored() -> None:
    counts, slow = Counts(), Slow(error=ValueError("bad"))
    cache = make(counts)
    led, followed = led_and_followed(cache, slow, 3)
    assert repr(led[0]) == "ValueError('bad')"
    assert [repr(each[0].error) for each in followed] == ["ValueError('bad')"] * 3
    assert (slow.calls, cache.stats().entries, cache.stats().under_way) == (1, 0, 0)
    assert (counts["miss"], counts["coalesced"]) == (1, 3)
    assert told(cache.answer([key("a")], computing("good"))) == [("good", "miss")]


def test_the_end_of_the_thread_that_computes_does_not_end_those_who_wait() -> None:
    slow = Slow(error=SystemExit())
    cache = make(Counts())
    first, led = in_threads(lambda: cache.answer([key("a")], slow))
    assert slow.began.wait(PATIENT_SECONDS)
    others, followed = in_threads(lambda: cache.answer([key("a")], computing("by myself")))
    wait_for_waiters(cache, key("a"), 1)
    slow.goes_on.set()
    join(first + others)
    assert isinstance(led[0], SystemExit)
    assert told(followed[0]) == [("by myself", "bypass")]


def test_who_has_waited_too_long_computes_and_others_then_wait_for_that() -> None:
    counts, slow = Counts(), Slow()
    cache = make(counts, wait_seconds=0.01)
    first, led = in_threads(lambda: cache.answer([key("a")], slow))
    assert slow.began.wait(PATIENT_SECONDS)
    assert told(cache.answer([key("a")], computing("fast"))) == [("fast", "miss")]
    assert told(cache.answer([key("a")], computing("never"))) == [("fast", "hit")]
    slow.goes_on.set()
    join(first)
    assert told(led[0]) == [("slow", "miss")]
    assert cache.stats().under_way == 0


def test_a_waiter_that_leaves_ends_nothing() -> None:
    slow = Slow()
    cache = make(Counts())
    first, led = in_threads(lambda: cache.answer([key("a")], slow))
    assert slow.began.wait(PATIENT_SECONDS)
    impatient = ResultCache.__new__(ResultCache)
    impatient.__dict__.update(cache.__dict__, _wait_seconds=0.0)  # the same answers, for somebody who does not wait

    def leave(indexes: Sequence[int]) -> list[Computed]:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        impatient.answer([key("a")], leave)
    slow.goes_on.set()
    join(first)
    assert told(led[0]) == [("slow", "miss")]
    assert told(cache.answer([key("a")], computing("other"))) == [("slow", "hit")]


def test_a_batch_computes_its_own_before_it_waits_for_another_so_that_no_two_wait_for_each_other() -> None:
    cache, other, own = make(Counts()), Slow("other"), Slow("own")
    first, _ = in_threads(lambda: cache.answer([key("a")], other))
    assert other.began.wait(PATIENT_SECONDS)
    second, answers = in_threads(lambda: cache.answer([key("a"), key("b")], own))
    assert own.began.wait(PATIENT_SECONDS)  # although what it waits for has not ended
    own.goes_on.set()
    other.goes_on.set()
    join(first + second)
    assert told(answers[0]) == [("other", "coalesced"), ("own", "miss")]


def test_what_was_under_way_when_the_cache_was_emptied_is_not_stored() -> None:
    slow = Slow()
    cache = make(Counts())
    first, led = in_threads(lambda: cache.answer([key("a")], slow))
    assert slow.began.wait(PATIENT_SECONDS)
    cache.clear()
    slow.goes_on.set()
    join(first)
    assert told(led[0]) == [("slow", "miss")]
    assert told(cache.answer([key("a")], computing("new"))) == [("new", "miss")]


def test_under_load_with_a_swap_nothing_stale_is_answered_and_each_key_is_computed_once() -> None:
    """32 threads ask 200 keys through 10 epochs; an answer says of which epoch and key it is."""
    counts = Counts()
    cache = make(counts, max_bytes=1 << 24)
    keys_asked, epochs, threads = 200, 10, 32
    serving = [0]
    computed: collections.Counter[tuple[int, int]] = collections.Counter()
    late: collections.Counter[tuple[int, int]] = collections.Counter()
    lock = threading.Lock()
    wrong: list[tuple[int, int, Any]] = []
    answered = [0] * threads

    def ask(thread: int) -> None:
        draw = random.Random(thread)
        while serving[0] < epochs:
            epoch = serving[0]
            if epoch >= epochs:
                return
            wanted = [min(keys_asked - 1, int(draw.paretovariate(1.1)) - 1) for _ in range(4)]

            def compute(indexes: Sequence[int], epoch: int = epoch, wanted: list[int] = wanted) -> list[Computed]:
                values = [(epoch, wanted[index]) for index in indexes]
                # A thread that read the epoch before a swap may ask after it: then the emptied cache does not know.
                with lock:
                    (late if cache._epoch > epoch else computed).update(values)
                return [Computed(value, value, 64) for value in values]

            answers = cache.answer([key((epoch, name)) for name in wanted], compute, epoch=epoch)
            for name, each in zip(wanted, answers, strict=True):
                if each.value != (epoch, name) or each.error is not None:
                    wrong.append((epoch, name, each))
            answered[thread] += len(answers)

    def swap() -> None:
        for _ in range(epochs):
            before = sum(answered)
            while sum(answered) < before + 2000:
                threading.Event().wait(0.001)
            serving[0] += 1

    running, _ = in_threads(*[lambda thread=number: ask(thread) for number in range(threads)], swap)
    join(running)
    assert wrong == []
    assert sum(answered) >= 2000 * epochs
    assert set(computed.values()) == {1}
    assert {epoch for epoch, _ in computed} == set(range(epochs))
    assert counts["hit"] + counts["miss"] + counts["coalesced"] == sum(answered)
    assert counts["miss"] == sum(computed.values()) + sum(late.values())
    assert cache.stats().under_way == 0

"""``result_cache: {on: tensors}`` in the process that workers share: one cache for all of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.workers import Start, check_answer

pytestmark = pytest.mark.processes

ONE, TWO, THREE = [1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 8.0], [9.0, 8.0, 7.0, 6.0]


def test_workers_share_one_cache_and_its_counts(start: Start, archive: Path) -> None:
    first, second = (start(result_cache={"on": "tensors"}) for _ in range(2))
    assert first.ready() == second.ready()
    check_answer(first.call([ONE, TWO]), archive, [ONE, TWO])
    check_answer(second.call([ONE, TWO]), archive, [ONE, TWO])
    check_answer(second.call([THREE]), archive, [THREE])
    facts, other = first.describe()["facts"], second.describe()
    shown = facts["result_cache"]
    assert (shown["on"], shown["reason"], shown["entries"]) == ("tensors", None, 2)
    counters = facts["counters"]
    assert (counters["result_cache_hit"], counters["result_cache_miss"]) == (1, 2)
    assert other["facts"]["result_cache"]["stored_bytes"] == shown["stored_bytes"]
    assert second.call([[500.0] * 4])["error"] == second.call([[500.0] * 4])["error"] == "ModelProcessError"
    told = [worker.describe()["counters"] for worker in (first, second)]
    assert sum(each["result_cache_hit"] for each in told) == 1
    assert sum(each["result_cache_miss"] for each in told) == 4
    assert first.describe()["facts"]["result_cache"]["entries"] == 2

"""What a test costs is found in its code, and what it starts is seen."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.support import costs
from tests.support.subprocesses import run_python
from tests.support.workers import Worker


def helper() -> str:
    return run_python("pass")


class Holder:
    def worker(self) -> type[Worker]:
        return Worker


def derived(function: object) -> set[str]:
    """The marks of a test with this code."""
    found: set[str] = set()
    todo, seen = [function], set()
    while todo:
        each = todo.pop()
        if id(each) not in seen:
            seen.add(id(each))
            found |= {mark} if (mark := getattr(each, costs.MARK, None)) else set()
            todo += costs.reached(each)
    return found


def test_a_mark_follows_from_what_the_code_names() -> None:
    assert derived(helper) == derived(lambda: [helper() for _ in "ab"]) == derived(lambda: Holder()) == {"processes"}
    assert derived(lambda: costs.COSTS) == set()


def test_a_helper_refuses_a_test_without_its_mark(monkeypatch: pytest.MonkeyPatch) -> None:
    called = []
    expensive = costs.costs("serving")(lambda: called.append(1))
    with pytest.raises(pytest.fail.Exception, match="the mark `serving` says"):
        expensive()
    monkeypatch.setattr(costs, "_running", [])  # between tests
    expensive()
    assert called == [1]


def test_a_process_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[str] = []
    monkeypatch.setattr(costs, "_started", started)
    subprocess.run(["g++", "--version"], capture_output=True, check=False)
    assert started == []
    subprocess.run([sys.executable, "-c", "pass"], check=True)
    assert len(started) == 1

"""A slow or dead service costs its timeout once; then the host goes on alone, in every process."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest

from ts_handlers.errors import RefusedError, RemoteError
from ts_handlers.store.remote import breaker as module
from ts_handlers.store.remote.base import UnusableError
from ts_handlers.store.remote.breaker import Breaker
from ts_handlers.store.remote.budget import TimeBudget


@pytest.fixture
def state(tmp_path: Path) -> Path:
    return tmp_path / "remote" / "service.json"


def hang(given_up: threading.Event) -> None:
    given_up.wait(60)


def test_answers_and_the_calls_own_errors_do_not_open_it(state: Path) -> None:
    breaker = Breaker(state, "service", TimeBudget(30.0))
    assert breaker.call("asking", lambda _: 17) == 17
    for error in (FileNotFoundError("x"), FileExistsError("x"), RefusedError("x")):

        def fail(_: threading.Event, error: Exception = error) -> None:
            raise error

        with pytest.raises(type(error)):
            breaker.call("asking", fail)
    assert not breaker.is_open
    assert not state.exists()


def test_after_a_timeout_nothing_is_tried_by_any_process_of_the_host(state: Path) -> None:
    calls: list[str] = []
    breaker = Breaker(state, "service", TimeBudget(0.2))
    with pytest.raises(RemoteError, match=r"service: asking: no answer within the 0\.2 s") as caught:
        breaker.call("asking", hang)
    assert caught.value.first
    for other in (breaker, Breaker(state, "service", TimeBudget(0.2))):
        with pytest.raises(RemoteError, match="no answer within") as caught:
            other.call("asking", lambda _: calls.append("x"))
        assert not caught.value.first
    assert calls == []


def test_what_nobody_waits_for_any_more_is_told_so(state: Path) -> None:
    told = threading.Event()

    def wait(given_up: threading.Event) -> None:
        if given_up.wait(60):
            told.set()

    with pytest.raises(RemoteError):
        Breaker(state, "service", TimeBudget(0.1)).call("asking", wait)
    assert told.wait(60)


def test_calls_that_count_share_one_budget_and_others_have_their_own(
    state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    breaker = Breaker(state, "service", TimeBudget(50.0))
    now = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])

    def take(seconds: float) -> None:
        breaker.call("asking", lambda _: now.__setitem__(0, now[0] + seconds))

    with breaker.budget.counting():
        take(30.0)
    take(40.0)
    with breaker.budget.counting():
        take(20.0)
        assert not breaker.is_open
        with pytest.raises(RemoteError, match="no answer within the 50 s"):
            breaker.call("asking", hang)


def test_a_failure_gives_the_next_attempt_a_whole_budget(state: Path) -> None:
    breaker = Breaker(state, "service", TimeBudget(0.1))
    with breaker.budget.counting():
        with pytest.raises(RemoteError, match=r"no answer within the 0\.1 s"):
            breaker.call("asking", hang)
        assert breaker.budget.left > 0.0


@pytest.mark.parametrize(
    ("error", "text"),
    [(PermissionError("403"), "PermissionError: 403"), (UnusableError("mount it"), "asking: mount it")],
)
def test_errors_of_the_service_open_it_with_their_reason(error: Exception, text: str, state: Path) -> None:
    def fail(_: threading.Event) -> None:
        raise error

    breaker = Breaker(state, "service", TimeBudget(30.0))
    with pytest.raises(RemoteError, match=text):
        breaker.call("asking", fail)
    assert breaker.is_open
    assert text in str(breaker.reason)
    assert text in json.loads(state.read_text())["reason"]


def test_it_is_tried_again_after_the_pause_and_after_a_reboot(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RemoteError):
        Breaker(state, "service", TimeBudget(0.05)).call("asking", hang)
    facts = json.loads(state.read_text())
    for stale in ({**facts, "boot": "another"}, {**facts, "until": 0.0}, {**facts, "until": 1e12}, {}, []):
        state.write_text(json.dumps(stale))
        assert Breaker(state, "service", TimeBudget(30.0)).call("asking", lambda _: 17) == 17
    state.write_text("{half")
    assert not Breaker(state, "service", TimeBudget(30.0)).is_open
    state.write_text(json.dumps(facts))
    assert Breaker(state, "service", TimeBudget(30.0)).is_open
    monkeypatch.setattr(module.time, "monotonic", lambda: facts["until"] + 1)
    assert Breaker(state, "service", TimeBudget(30.0)).call("asking", lambda _: 17) == 17


def test_secrets_are_not_kept(state: Path) -> None:
    def fail(_: threading.Event) -> None:
        raise ConnectionError("password hunter2 refused")

    with pytest.raises(RemoteError, match=r"password \*\*\* refused"):
        Breaker(state, "service", TimeBudget(30.0), lambda text: text.replace("hunter2", "***")).call("asking", fail)
    assert "hunter2" not in state.read_text()


def test_a_folder_that_cannot_be_written_keeps_the_state_in_the_process(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    breaker = Breaker(tmp_path / "file" / "service.json", "service", TimeBudget(0.05))
    with pytest.raises(RemoteError):
        breaker.call("asking", hang)
    assert breaker.is_open

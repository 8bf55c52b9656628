"""What a dead, slow or broken remote store costs a start."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import msgspec
import pytest
from filelock import FileLock

from tests.store.tiered.conftest import BUILT, FETCHED, Fleet, counters, notes
from tests.support.tcp_proxy import Proxy
from tests.support.workers import wait_until
from ts_handlers.settings.sections import RemoteSettings
from ts_handlers.store.local.store import LocalStore
from ts_handlers.store.remote.breaker import Breaker
from ts_handlers.store.remote.budget import TimeBudget
from ts_handlers.store.tiered.store import TieredStore

pytestmark = pytest.mark.usefixtures("backend")


def test_dead_remote_is_asked_once_and_the_host_says_so(shared: Fleet, s3: RemoteSettings) -> None:
    with Proxy(mode="swallow") as silent:
        options = {**s3.options, "endpoint_url": f"http://127.0.0.1:{silent.port}"}
        dead = {"url": s3.url, "options": options, "timeout_seconds": 0.5}
        first = shared.start("host", **dead)
        assert first.outcome.result == "built"
        assert counters(first)["remote_failed"] == 1
        assert "going on alone" in notes(first)
        assert "no answer within the 0.5 s" in "\n".join(first.outcome.notes)
        assert wait_until(lambda: silent.connections == 1)  # by a thread that nobody waits for any more
        shutil.rmtree(shared.root / "host" / "entries")
        second = shared.start("host", **dead)  # another worker of the same host
        assert second.outcome.result == "built"
        assert silent.connections == 1
        assert "remote_failed" not in counters(second)
        assert "going on alone" in notes(second)


def test_opening_the_tiers_locks_and_folders_count_against_the_timeout(
    shared: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What comes before the first answer of the remote: imports, the lock of the host, a private folder."""
    counted: list[str] = []

    def noted(owner: Any, name: str) -> None:
        method = getattr(owner, name)

        def note(self: Any, *arguments: Any, **options: Any) -> Any:
            if any(budget.is_counting for budget in budgets):
                counted.append(name)
            return method(self, *arguments, **options)

        monkeypatch.setattr(owner, name, note)

    budgets: list[TimeBudget] = []
    create = TimeBudget.__init__
    monkeypatch.setattr(TimeBudget, "__init__", lambda self, seconds: (create(self, seconds), budgets.append(self))[0])
    for owner, name in ((TieredStore, "__init__"), (FileLock, "acquire"), (LocalStore, "staging"), (Breaker, "call")):
        noted(owner, name)
    shared.start("host", lease="off")
    assert list(dict.fromkeys(counted)) == ["__init__", "acquire", "call", "staging"]


def test_remote_that_fails_at_once_is_gone_on_without(shared: Fleet, tmp_path: Path) -> None:
    model = shared.start("host", url=f"file://{tmp_path}/not-mounted")
    assert model.outcome.result == "built"
    assert counters(model) == {"miss": 1, "build": 1, "canary_recorded": 1, "remote_failed": 1}
    assert "make or mount it" in notes(model)


def test_slow_remote_is_given_up_in_the_middle_of_an_entry(
    shared: Fleet, s3: RemoteSettings, s3_port: int, backend: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    build = backend.build

    def large(target: Any, workspace: Any) -> Any:
        (workspace.directory / "large").write_bytes(os.urandom(1 << 20))
        return build(target, workspace)

    monkeypatch.setattr(backend, "build", large)
    shared.remote = msgspec.to_builtins(s3)
    shared.start("first")
    with Proxy(("127.0.0.1", s3_port)) as slow:
        slow.bytes_per_second = 20_000
        options = {**s3.options, "endpoint_url": f"http://127.0.0.1:{slow.port}"}
        model = shared.start("second", options=options, timeout_seconds=2.0)
    assert model.outcome.result == "built"
    assert counters(model)["remote_failed"] == 1
    assert list((shared.root / "second" / "staging").iterdir()) == []
    assert counters(shared.start("third")) == FETCHED


def test_dead_lease_service_costs_no_entry(shared: Fleet) -> None:
    model = shared.start("first", lease="redis://127.0.0.1:1/0")
    assert model.outcome.result == "built"
    assert counters(model) == {**BUILT, "remote_failed": 1}
    assert "going on alone" in notes(model)
    assert shared.start("second").outcome.result == "hit"

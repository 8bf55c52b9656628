"""Starts of several hosts that share a remote store: what travels, what is refused, and what a dead remote costs."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from tests.support.file_backend import FileBackend
from tests.support.marks import needs_root
from tests.support.models import archive_source, eager_model, settings_of, write_weights
from tests.support.subprocesses import finish, run_python, start_python
from tests.support.tcp_proxy import Proxy
from ts_handlers import CompiledModel, start_model
from ts_handlers.errors import LoadError, SettingsError
from ts_handlers.settings.sections import RemoteSettings
from ts_handlers.store.local import store as local
from ts_handlers.store.remote.breaker import Breaker
from ts_handlers.store.remote.sealed import MAGIC
from ts_handlers.store.tiered.store import TieredStore

pytestmark = pytest.mark.usefixtures("backend")

ROWS = torch.arange(8.0).reshape(2, 4)


@dataclasses.dataclass
class Fleet:
    """Starts the archive's model on hosts, each with a store of its own below `root`."""

    archive: Path
    root: Path
    remote: dict[str, Any]

    def start(self, host: str, trust: dict[str, Any] | None = None, **remote: Any) -> CompiledModel:
        section = {"store": str(self.root / host), "backends": ["aot_inductor", "eager"], "trust": trust or {}}
        settings = settings_of(**section, remote={**self.remote, **remote})
        model = start_model(archive_source(self.archive), settings)
        assert isinstance(model.store, TieredStore)
        assert model.store.write_back.wait(60)
        with torch.inference_mode():
            assert torch.allclose(model(ROWS), eager_model(self.archive)(ROWS), atol=1e-5)
        json.dumps(model.describe())
        return model


@pytest.fixture
def fleet(archive: Path, tmp_path: Path, remote_settings: RemoteSettings) -> Fleet:
    return Fleet(archive, tmp_path, msgspec.to_builtins(remote_settings))


@pytest.fixture
def shared(archive: Path, tmp_path: Path, folder: RemoteSettings) -> Fleet:
    """A fleet that shares the folder ``remote``."""
    return Fleet(archive, tmp_path, msgspec.to_builtins(folder))


def trust(keys: Path, accepted: str, signing: str | None = None) -> dict[str, Any]:
    section: dict[str, Any] = {"public_keys": [str(keys / f"{name}.pub") for name in accepted]}
    return section if signing is None else {**section, "signing_key": str(keys / f"{signing}.key")}


def counters(model: CompiledModel) -> dict[str, int]:
    return {name: count for name, count in model.metrics.counters.items() if count}


def notes(model: CompiledModel) -> str:
    assert model.store is not None
    return "\n".join(model.store.notes)


def objects(fleet: Fleet, kind: str) -> list[Path]:
    return sorted(path for path in (fleet.root / "remote" / kind).rglob("*") if path.is_file())


BUILT = {"miss": 1, "build": 1, "canary_recorded": 1, "remote_miss": 2, "write_back": 2}
FETCHED = {"hit": 1, "remote_hit": 1}


def test_first_host_builds_and_others_fetch_the_entry_and_its_canary(fleet: Fleet) -> None:
    first = fleet.start("first")
    assert counters(first) == BUILT
    assert notes(first) == ""
    second = fleet.start("second")
    assert second.outcome.result == "hit"
    assert second.outcome.canary is not None
    assert second.outcome.canary["source"] == "record"  # no eager model was built
    assert counters(second) == FETCHED
    assert second.metrics.phases_ms["fetch"] > 0
    third = fleet.start("second")
    assert counters(third) == {"hit": 1}
    assert "fetch" not in third.metrics.phases_ms


def test_remote_hit_costs_one_request_for_each_object(shared: Fleet, s3: RemoteSettings, s3_port: int) -> None:
    pytest.importorskip("obstore", reason="obstore is not installed")
    shared.remote = msgspec.to_builtins(s3)
    shared.start("first")
    with Proxy(("127.0.0.1", s3_port)) as proxy:
        options = {**s3.options, "endpoint_url": f"http://127.0.0.1:{proxy.port}"}
        assert counters(shared.start("second", options=options)) == FETCHED
    wanted = [re.match(rb"GET /[^/]+/[^/]+/some/prefix/(entries|canaries)/", line) for line in proxy.requests]
    assert [found and found[1] for found in wanted] == [b"entries", b"canaries"]


def test_new_weights_are_checked_by_one_host_for_all(shared: Fleet) -> None:
    shared.start("first")
    shared.start("second")
    write_weights(shared.archive, 7)
    assert counters(shared.start("second")) == {"hit": 1, "canary_recorded": 1, "write_back": 1}
    assert counters(shared.start("first")) == {"hit": 1}
    assert counters(shared.start("third")) == FETCHED


def test_local_hit_neither_asks_the_remote_nor_imports_anything_for_it(shared: Fleet) -> None:
    shared.start("host")
    shutil.rmtree(shared.root / "remote")
    assert counters(shared.start("host")) == {"hit": 1}
    code = """
        import json, sys
        import torch
        from tests.support.file_backend import use_file_backend
        from tests.support.models import archive_source, settings_of
        from ts_handlers import start_model
        use_file_backend()
        before = set(sys.modules)
        settings = settings_of(store=sys.argv[2], backends=["aot_inductor"], remote=json.loads(sys.argv[3]))
        model = start_model(archive_source(sys.argv[1]), settings)
        print(json.dumps([model.outcome.result, sorted(set(sys.modules) - before)]))
    """
    remote = {**shared.remote, "lease": "redis://127.0.0.1:1/0"}
    result, modules = json.loads(run_python(code, shared.archive, shared.root / "host", json.dumps(remote)))
    assert result == "hit"
    heavy = {"fsspec", "obstore", "redis", "cryptography", "s3fs", "filelock", "ts_handlers.store.remote.redis_lease"}
    assert not {name.partition(".")[0] for name in modules} & heavy


def test_read_only_host_takes_and_gives_nothing(shared: Fleet) -> None:
    alone = {name: count for name, count in BUILT.items() if name != "write_back"}
    assert counters(shared.start("reader", read_only=True)) == alone
    assert objects(shared, "") == []
    shared.start("writer")
    before = objects(shared, "")
    assert counters(shared.start("another reader", read_only=True)) == FETCHED
    assert objects(shared, "") == before


def test_signed_entries_are_accepted_and_others_refused_and_built_anew(shared: Fleet, keys: Path) -> None:
    shared.start("unsigned")
    signed = shared.start("signed", trust(keys, "a", "a"))
    assert signed.outcome.result == "built"
    assert counters(signed)["remote_refused"] == 3  # the entry, before and under the lease, and the canary
    assert counters(signed)["write_back"] == 2
    assert "not signed" in notes(signed)
    assert [path.suffix for path in objects(shared, "entries")] == [".0", ".1"]
    follower = shared.start("follower", trust(keys, "ab"))
    assert counters(follower)["remote_hit"] == 1
    assert counters(follower)["remote_refused"] == 2  # entry and canary of the unsigned host
    foreign = shared.start("foreign", trust(keys, "b", "b"))
    assert foreign.outcome.result == "built"
    assert "not among" in notes(foreign)
    assert shared.start("anything goes").outcome.result == "hit"


def test_rotation(shared: Fleet, keys: Path) -> None:
    shared.start("old", trust(keys, "a", "a"))
    assert counters(shared.start("both", trust(keys, "ab", "b"))) == FETCHED
    new = shared.start("new", trust(keys, "b", "b"))
    assert new.outcome.result == "built"
    assert shared.start("new too", trust(keys, "b")).outcome.result == "hit"
    assert counters(shared.start("still old", trust(keys, "a"))) == FETCHED


def test_host_that_cannot_sign_sends_nothing_where_signatures_are_required(shared: Fleet, keys: Path) -> None:
    model = shared.start("host", trust(keys, "a"))
    assert model.outcome.result == "built"
    assert "signing_key is not" in notes(model)
    assert objects(shared, "") == []


def test_wrong_key_file_is_a_mistake_of_the_settings(shared: Fleet, tmp_path: Path) -> None:
    (tmp_path / "nonsense.pub").write_text("nonsense")
    with pytest.raises(SettingsError, match=r"public_keys\[0\].*no public key"):
        shared.start("host", {"public_keys": [str(tmp_path / "nonsense.pub")]})


def _flip(data: bytes, position: int) -> bytes:
    return data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :]


TAMPERED: dict[str, Callable[[bytes], bytes]] = {
    "file": lambda data: _flip(data, len(data) - 1),
    "header": lambda data: _flip(data, len(MAGIC) + 100),
    "truncated": lambda data: data[:-10],
    "extended": lambda data: data + b"x",
    "emptied": lambda data: b"",
    "another kind of file": lambda data: b"PK\x03\x04" + bytes(5000),
}


@pytest.mark.parametrize("change", TAMPERED)
@pytest.mark.parametrize("signed", [False, True], ids=["unsigned", "signed"])
def test_tampered_entry_is_refused_counted_and_built_anew(change: str, signed: bool, shared: Fleet, keys: Path) -> None:
    section = trust(keys, "a", "a") if signed else {}
    shared.start("first", section)
    (path,) = objects(shared, "entries")
    path.write_bytes(TAMPERED[change](path.read_bytes()))
    tampered = path.read_bytes()
    second = shared.start("second", section)
    assert second.outcome.result == "built"
    assert second.outcome.fallbacks == ()
    assert counters(second)["remote_refused"] == 2
    assert "refused from the remote" in notes(second)
    assert path.read_bytes() == tampered  # nothing is replaced; the good object stands beside it
    assert counters(shared.start("third", section))["remote_hit"] == 1
    assert list((shared.root / "second" / "staging").iterdir()) == []


def test_entry_moved_to_another_address_is_refused(shared: Fleet) -> None:
    shared.start("first")
    (path,) = objects(shared, "entries")
    write = shared.archive / "model.py"
    write.write_text(write.read_text().replace("torch.nn.Linear(4, 3)", "torch.nn.Linear(4, 3) "))
    shared.start("second")
    (other,) = (found for found in objects(shared, "entries") if found != path)
    shutil.copy(path, other)
    third = shared.start("third")
    assert third.outcome.result == "built"
    assert "expected 'model/" in notes(third)


def test_tampered_canary_is_refused_and_recorded_again(shared: Fleet) -> None:
    shared.start("first")
    (path,) = objects(shared, "canaries")
    path.write_bytes(_flip(path.read_bytes(), len(path.read_bytes()) - 1))
    second = shared.start("second")
    assert second.outcome.result == "hit"
    assert counters(second) == {**FETCHED, "remote_refused": 1, "canary_recorded": 1, "write_back": 1}
    assert counters(shared.start("third")) == {**FETCHED, "remote_refused": 1}


def test_entry_that_is_damaged_here_is_fetched_anew(shared: Fleet) -> None:
    shared.start("first")
    (path,) = (shared.root / "first" / "entries").rglob("second.json")
    path.write_text("damaged")
    again = shared.start("first")
    assert again.outcome.result == "hit"
    assert counters(again) == {**FETCHED, "corrupt": 1}
    assert "damaged entry, fetched anew" in notes(again)


def test_entry_that_does_not_load_here_is_built_here_and_fetched_once(shared: Fleet, backend: FileBackend) -> None:
    shared.start("first")
    backend.load_errors.append(LoadError("undefined symbol"))
    second = shared.start("second")
    assert second.outcome.result == "built"
    assert counters(second)["remote_hit"] == 1
    assert counters(shared.start("second")) == {"hit": 1}


def test_dead_remote_is_asked_once_and_the_host_says_so(shared: Fleet, s3: RemoteSettings) -> None:
    with Proxy(mode="swallow") as silent:
        options = {**s3.options, "endpoint_url": f"http://127.0.0.1:{silent.port}"}
        dead = {"url": s3.url, "options": options, "timeout_seconds": 0.5}
        first = shared.start("host", **dead)
        assert first.outcome.result == "built"
        assert counters(first)["remote_failed"] == 1
        assert "going on alone" in notes(first)
        assert "no answer within the 0.5 s" in "\n".join(first.outcome.notes)
        asked = silent.connections
        shutil.rmtree(shared.root / "host" / "entries")
        second = shared.start("host", **dead)  # another worker of the same host
        assert second.outcome.result == "built"
        assert silent.connections == asked
        assert "remote_failed" not in counters(second)
        assert "going on alone" in notes(second)


def test_what_comes_before_the_first_call_is_charged_too(shared: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []

    def noted(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def note(*arguments: Any, **options: Any) -> Any:
            events.append(name)
            return method(*arguments, **options)

        return note

    for name in ("charge", "call"):
        monkeypatch.setattr(Breaker, name, noted(name, getattr(Breaker, name)))
    shared.start("host")
    # Opening the tiers; the lock of the host and a private folder; what the call itself took.
    assert events[:4] == ["charge", "charge", "call", "charge"]


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


@pytest.mark.parametrize("lease", ["auto", "off", pytest.param("redis", marks=pytest.mark.services)])
def test_every_kind_of_lease(lease: str, shared: Fleet, request: pytest.FixtureRequest) -> None:
    value = request.getfixturevalue("redis_url") if lease == "redis" else lease
    assert counters(shared.start("first", lease=value)) == BUILT
    assert counters(shared.start("second", lease=value)) == FETCHED
    signs = [path.read_bytes() for path in objects(shared, "leases") if path.suffix == ".sign"]
    assert signs == ([b"released"] if lease == "auto" else [])


def test_file_system_without_exclusive_create_is_read_only(shared: Fleet) -> None:
    model = shared.start("host", url="memory://somewhere")
    assert model.outcome.result == "built"
    assert counters(model)["write_back_failed"] == 2
    assert "no atomic create" in notes(model)


def test_first_writer_wins_and_the_loser_keeps_its_own(
    shared: Fleet, backend: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    build = backend.build

    def meanwhile(target: Any, workspace: Any) -> Any:
        monkeypatch.setattr(backend, "build", build)
        winners.append(shared.start("winner", lease="off"))
        winners.extend(objects(shared, "entries"))
        winners.append(winners[1].read_bytes())
        return build(target, workspace)

    winners: list[Any] = []
    monkeypatch.setattr(backend, "build", meanwhile)
    loser = shared.start("loser", lease="off")
    assert loser.outcome.result == "built"
    assert "write_back" not in counters(loser)
    assert objects(shared, "entries") == [winners[1]]
    assert winners[1].read_bytes() == winners[2]
    assert counters(shared.start("loser")) == {"hit": 1}


def test_holder_that_was_taken_over_does_not_publish(
    shared: Fleet, backend: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    build = backend.build

    def overtaken(target: Any, workspace: Any) -> Any:
        (lease,) = (path for path in objects(shared, "leases") if path.suffix == "")
        (lease.parent / "0000000002").write_bytes(b"")  # what a waiter makes that has not heard of this holder
        return build(target, workspace)

    monkeypatch.setattr(backend, "build", overtaken)
    model = shared.start("host", heartbeat_seconds=60.0)
    assert model.outcome.result == "built"
    assert "write_back" not in counters(model)
    assert "taken the lease over" in notes(model)
    assert objects(shared, "entries") == []
    assert counters(shared.start("host")) == {"hit": 1}


def test_holder_that_is_cut_off_goes_on_alone_and_another_host_publishes(
    shared: Fleet, s3: RemoteSettings, s3_port: int, backend: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared.remote = msgspec.to_builtins(s3) | {"heartbeat_seconds": 0.5}
    build, others = backend.build, []

    def lose_the_network(target: Any, workspace: Any) -> Any:
        monkeypatch.setattr(backend, "build", build)
        proxy.cut()
        others.append(shared.start("other"))
        return build(target, workspace)

    monkeypatch.setattr(backend, "build", lose_the_network)
    with Proxy(("127.0.0.1", s3_port)) as proxy:
        options = {**s3.options, "endpoint_url": f"http://127.0.0.1:{proxy.port}"}
        model = shared.start("cut off", options=options, timeout_seconds=3.0)
    assert model.outcome.result == others[0].outcome.result == "built"
    assert counters(others[0])["takeover"] == 1
    assert counters(others[0])["write_back"] == 2
    assert "write_back" not in counters(model)
    assert "going on alone" in notes(model) or "not sent" in notes(model)
    assert counters(shared.start("third")) == FETCHED


def test_what_could_not_be_sent_is_sent_by_a_later_start(shared: Fleet) -> None:
    (shared.root / "remote").rmdir()
    assert counters(shared.start("host"))["remote_failed"] == 1
    (shared.root / "remote").mkdir()
    assert counters(shared.start("host")) == {"hit": 1}  # the pause is not over
    assert objects(shared, "") == []
    for path in (shared.root / "host" / "remote").glob("*.json"):
        path.unlink()
    assert counters(shared.start("host", read_only=True)) == {"hit": 1}
    assert counters(shared.start("host")) == {"hit": 1, "write_back": 2}
    assert counters(shared.start("host")) == {"hit": 1}
    assert list((shared.root / "host" / "remote").iterdir()) == []
    assert counters(shared.start("other")) == FETCHED


def test_canary_record_that_a_killed_process_could_not_send_is_sent_by_the_next_start(shared: Fleet) -> None:
    code = """
        import json, signal, sys
        from tests.support.file_backend import use_file_backend
        from tests.support.models import archive_source, settings_of
        from ts_handlers import start_model
        from ts_handlers.store.remote.objects import Remote
        use_file_backend()
        Remote.create = lambda *arguments, **options: signal.pause()
        settings = settings_of(store=sys.argv[2], backends=["aot_inductor"], remote=json.loads(sys.argv[3]))
        print(json.dumps(start_model(archive_source(sys.argv[1]), settings).metrics.counters), flush=True)
        signal.pause()
    """
    shared.start("host")
    write_weights(shared.archive, 7)
    process = start_python(code, shared.archive, shared.root / "host", json.dumps(shared.remote))
    assert process.stdout is not None
    found = json.loads(process.stdout.readline())
    assert (found["hit"], found["canary_recorded"], found["write_back"]) == (1, 1, 0)
    process.terminate()
    finish(process, -signal.SIGTERM)
    assert len(objects(shared, "canaries")) == 1
    assert counters(shared.start("host")) == {"hit": 1, "write_back": 1}
    assert list((shared.root / "host" / "remote").iterdir()) == []
    assert counters(shared.start("host")) == {"hit": 1}
    assert counters(shared.start("other")) == FETCHED


def test_full_or_read_only_store_still_sends_what_it_built(shared: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any) -> Any:
        raise OSError(errno.EROFS, "read-only")

    with monkeypatch.context() as patched:
        patched.setattr(local.os, "rename", fail)
        model = shared.start("host")
        assert model.outcome.result == "built"
        again = shared.start("host")  # fetched, and served from a temporary folder
    assert counters(again) == {**FETCHED, "publish_failed": 1}
    assert len(objects(shared, "entries")) == len(objects(shared, "canaries"))


@needs_root
def test_read_only_store_is_served_from_the_remote(shared: Fleet) -> None:
    shared.start("first")
    disk = shared.root / "disk"
    (disk).mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k,mode=700,ro", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("a tmpfs cannot be mounted here")
    try:
        model = shared.start("disk")
        assert model.outcome.result == "hit"
        assert counters(model)["remote_hit"] == 1
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def test_end_of_the_process_waits_for_what_is_being_sent(shared: Fleet) -> None:
    code = """
        import json, sys, time
        import torch
        from tests.support.file_backend import use_file_backend
        from tests.support.models import archive_source, settings_of
        from ts_handlers import start_model
        from ts_handlers.store.remote.objects import Remote
        use_file_backend()
        create = Remote.create
        def slow(self, name, *arguments, **options):
            if name.startswith("entries"):
                time.sleep(float(sys.argv[4]))
            return create(self, name, *arguments, **options)
        Remote.create = slow
        settings = settings_of(store=sys.argv[2], backends=["aot_inductor"], remote=json.loads(sys.argv[3]))
        model = start_model(archive_source(sys.argv[1]), settings)
        import atexit
        print("started", flush=True)
        atexit.unregister(model.store.write_back.close)
        def end():
            model.store.write_back.close()
            print(json.dumps(model.metrics.counters))
        atexit.register(end)
    """
    for seconds, timeout in ((1, 30.0), (60, 0.5)):
        remote = json.dumps({**shared.remote, "timeout_seconds": timeout, "lease": "off"})
        out = run_python(code, shared.archive, shared.root / f"host-{seconds}", remote, seconds)
        found = json.loads(out.splitlines()[-1])
        if seconds == 1:
            assert (found["write_back"], found["write_back_failed"]) == (2, 0)
            shutil.rmtree(shared.root / "remote")
            (shared.root / "remote").mkdir()
        else:
            assert (found["write_back"], found["write_back_failed"]) == (1, 1)  # the canary, and not the entry

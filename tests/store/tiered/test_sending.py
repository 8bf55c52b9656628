"""What is sent to a remote store, by whom, and what becomes of it when the sender is overtaken, cut off or ends."""

from __future__ import annotations

import dataclasses
import errno
import json
import signal
from typing import Any

import msgspec
import pytest

from tests.store.tiered.conftest import FETCHED, Fleet, counters, notes, objects
from tests.support.models import write_weights
from tests.support.subprocesses import finish, run_python, start_python
from tests.support.tcp_proxy import Proxy
from ts_handlers.settings.sections import RemoteSettings
from ts_handlers.store.local import store as local

pytestmark = pytest.mark.usefixtures("backend")


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
        model = shared.start("cut off", options=options)
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


def test_two_names_of_one_model_are_both_sent_and_fetched(shared: Fleet) -> None:
    """At once, and by a later start when the remote was away."""
    names = {"linear": dataclasses.replace(shared, model="linear"), "twin": dataclasses.replace(shared, model="twin")}
    (shared.root / "remote").rmdir()
    for fleet in names.values():
        assert fleet.start("host").outcome.result == "built"
    (shared.root / "remote").mkdir()
    for path in (shared.root / "host" / "remote").glob("*.json"):
        path.unlink()
    assert counters(names["linear"].start("host")) == {"hit": 1, "write_back": 2}
    assert counters(names["twin"].start("host")) == {"hit": 1, "write_back": 1}  # their canary record is the same
    assert list((shared.root / "host" / "remote").iterdir()) == []
    assert counters(names["linear"].start("other")) == FETCHED
    assert counters(names["twin"].start("other"))["remote_hit"] == 1


def test_canary_record_that_a_killed_process_could_not_send_is_sent_by_the_next_start(shared: Fleet) -> None:
    code = """
        import json, signal, sys
        from tests.support.file_backend import use_file_backend
        from tests.support.models import archive_source, settings_of
        from ts_handlers import start_model
        from ts_handlers.store.remote.objects import RemoteObjects
        use_file_backend()
        RemoteObjects.create = lambda *arguments, **options: signal.pause()
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


SLOW_SENDER = """
    import atexit, json, os, sys, threading, time
    import torch
    from tests.support.file_backend import use_file_backend
    from tests.support.models import archive_source, settings_of
    from ts_handlers import start_model
    from ts_handlers.store.remote.objects import RemoteObjects
    archive, store, remote, gate, seconds = sys.argv[1:]
    use_file_backend()
    create, reached = RemoteObjects.create, threading.Event()

    def slow(self, name, *arguments, **options):
        if name.startswith("entries"):
            reached.set()
            while not os.path.exists(gate):
                time.sleep(0.02)
        return create(self, name, *arguments, **options)

    RemoteObjects.create = slow
    settings = settings_of(store=store, backends=["aot_inductor"], remote=json.loads(remote))
    model = start_model(archive_source(archive), settings)
    reached.wait()  # so the canary record, which is sent before the entry, is there
    write_back = model.store.write_back
    write_back.seconds = float(seconds)
    atexit.unregister(write_back.close)

    def end():
        print("ending", flush=True)
        write_back.close()
        print(json.dumps(model.metrics.counters))

    atexit.register(end)
"""


def test_end_of_the_process_waits_for_what_is_being_sent(shared: Fleet) -> None:
    remote, gate = json.dumps({**shared.remote, "lease": "off"}), shared.root / "gate"
    process = start_python(SLOW_SENDER, shared.archive, shared.root / "host", remote, gate, 300)
    assert process.stdout is not None
    assert process.stdout.readline() == "ending\n"
    assert objects(shared, "entries") == []
    gate.touch()
    found = json.loads(finish(process).splitlines()[-1])
    assert (found["write_back"], found["write_back_failed"]) == (2, 0)
    assert len(objects(shared, "entries")) == 1


def test_end_of_the_process_gives_up_what_takes_too_long(shared: Fleet) -> None:
    remote, never = json.dumps({**shared.remote, "lease": "off"}), shared.root / "never"
    out = run_python(SLOW_SENDER, shared.archive, shared.root / "host", remote, never, 0.2)
    found = json.loads(out.splitlines()[-1])
    assert (found["write_back"], found["write_back_failed"]) == (1, 1)  # the canary record, and not the entry
    assert objects(shared, "entries") == []
